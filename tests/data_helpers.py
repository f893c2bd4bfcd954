"""Specs, uploads and tokenizers for the data tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from service.errors import JobFailure
from service.specs import CptSpec, IftSpec, parse_spec
from service.templates import StoredTemplate
from worker.data import Prepared, prepare

CHATML_TOKENS = ["<|im_start|>", "<|im_end|>"]


def data_spec(
    kind: str, template: dict[str, Any], *, size: int = 64, responses_only: bool = False, **dataset: Any
) -> CptSpec | IftSpec:
    source = {} if "path" in dataset else {"file_id": "file_1"}
    spec = parse_spec(
        {
            "kind": kind,
            "adapter": "x",
            "model": {"max_seq_length": size},
            "dataset": {k: v for k, v in {"test_size": 0, **source, **dataset}.items() if v is not ...}
            | {"template": template},
            "training": {"train_on_responses_only": responses_only},
        }
    )
    assert isinstance(spec, (CptSpec, IftSpec))
    return spec


def upload(folder: Path, rows: list[Any], name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def failure(spec: CptSpec | IftSpec, tokenizer: Any, file: Path | None) -> JobFailure:
    with pytest.raises(JobFailure) as e:
        prepare(spec, tokenizer, file=file)
    return e.value


def texts(data: Prepared, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(row["input_ids"]) for row in data.train]


def answers(row: dict[str, Any], tokenizer: Any) -> list[str]:
    """The trained stretches of a row, decoded."""
    out: list[list[int]] = []
    before = -100
    for label in row["labels"]:
        if label != -100:
            out[-1].append(label) if before != -100 else out.append([label])
        before = label
    return [tokenizer.decode(ids) for ids in out]


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text as the engine makes them."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def sentencepiece_tokenizer(t: StoredTemplate | None = None) -> Any:
    """A tokenizer in Llama 2's manner: a space is put in front of each text, BOS by itself, bytes as fallback."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    from tests.tiny import stdlib_text

    tok = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    tok.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special, show_progress=False)
    clean = (text.replace("\n", " ") for text in stdlib_text(100_000))
    tok.train_from_iterator(clean, trainer)
    tok.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tok.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
