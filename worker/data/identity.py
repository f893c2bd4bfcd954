"""What prepared data depend on, as one SHA-256: the key under which they are kept (kept.py)."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import service.templates
from service.specs import CptSpec, IftSpec
from service.templates import StoredTemplate
from worker.data.uploads import Source

# Libraries that render, tokenise, shuffle and split, or hold the result.
PACKAGES = ("datasets", "jinja2", "numpy", "pyarrow", "tokenizers", "transformers")
# Of dataset, what says where rows are: what they hold and how the template was resolved is in the key instead.
_WHERE = {"path", "name", "revision", "split", "streaming", "file_id", "eval_file_id", "template"}
# Of a chat template, what writes something else each time, and times finer than a day.
_CHANCE = re.compile(r"\|\s*random\b|\blipsum\b")
_TIME = re.compile(r"(?<!\{)%-?[fHIMSTXcprsz]")


class Unfit(Exception):
    """Why these data are not to be kept."""


def identify(
    spec: CptSpec | IftSpec,
    tokenizer: Any,
    template: StoredTemplate,
    source: Source,
    file: Path | None,
    eval_file: Path | None,
) -> str:
    """The key of what prepare() makes of its arguments, in hexadecimal. The contents of files are read for it.

    Raises Unfit where the same arguments may give other data, and JobFailure as reading the source does.
    """
    parts = {
        "code": _code(),
        "kind": spec.kind,
        "tokenizer": _tokenizer(tokenizer),
        "template": template.fingerprint,
        "day": _day(template),
        "max_seq_length": spec.model.max_seq_length,
        "train_on_responses_only": spec.training.train_on_responses_only,
        "dataset": spec.dataset.model_dump(mode="json", exclude=_WHERE),
        "columns": source.columns,
        "rows": [_content(path) for path in (file, eval_file)] if file is not None else _digest(source),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@cache
def _code() -> list[str]:
    """This code as it is, so that no change of it finds what an older one made, and the versions of what it calls."""
    files = [*sorted(Path(__file__).parent.glob("*.py")), Path(service.templates.__file__)]
    own = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    return [own, *(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)]


def _tokenizer(tokenizer: Any) -> str:
    """All that a fast tokenizer goes by: vocabulary, merges, normaliser, added tokens. Its special tokens by name and its
    chat template are in the stored template."""
    kind = type(tokenizer)
    if not getattr(tokenizer, "is_fast", False) or kind.__module__.startswith("transformers_modules"):
        raise Unfit("the tokenizer is not the tokenizers library's alone, so it cannot be told from a changed one")
    state = [kind.__qualname__, bool(getattr(tokenizer, "split_special_tokens", False))]
    text = json.dumps(state) + tokenizer.backend_tokenizer.to_str()
    return hashlib.sha256(text.encode()).hexdigest()


def _day(template: StoredTemplate) -> str | None:
    """Today, if the template writes dates. Raises Unfit for what changes within a day."""
    text = template.chat_template or ""
    if _CHANCE.search(text):
        raise Unfit("the chat template writes something else each time")
    if "strftime_now" not in text:
        return None
    if _TIME.search(text):
        raise Unfit("the chat template writes the time of day")
    return date.today().isoformat()


def _content(file: Path | None) -> list[str] | None:
    """A file's format and SHA-256; None where there is none, or none any more: who reads it says so."""
    if file is None or not file.is_file():
        return None
    with open(file, "rb") as stream:
        return [file.suffix.lower(), hashlib.file_digest(stream, "sha256").hexdigest()]


def _digest(source: Source) -> str:
    if source.digest is None:
        raise Unfit("a stream may give other rows the next time")
    return source.digest()
