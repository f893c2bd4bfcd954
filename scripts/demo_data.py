#!/usr/bin/env python3
"""The demo's data: real text that every Python has, in a fixed order.

    python scripts/demo_data.py FOLDER

writes two uploads into FOLDER:

    cpt.jsonl   {"title", "text"}: the language reference (pydoc_data.topics), as it is but for space at line ends
    ift.jsonl   {"messages": [user, assistant]}: questions about the standard library, answered by its docstrings

Only the standard library is needed. QUESTIONS are asked of every model at the end of the demo; neither they nor their
answers are in ift.jsonl, so that no answer was learnt by heart.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

QUESTIONS = [
    "What does str.partition do in Python?",
    "What does dict.setdefault do in Python?",
    "What is collections.Counter in Python?",
    "What does os.path.join do in Python?",
]

MODULES = """
    builtins abc argparse array ast asyncio base64 bisect bz2 calendar cmath codecs collections collections.abc
    configparser contextlib copy csv dataclasses datetime decimal difflib dis email.message enum errno fileinput fnmatch
    fractions ftplib functools gc getpass gettext glob gzip hashlib heapq hmac html http.client http.server inspect io
    ipaddress itertools json linecache locale logging lzma mailbox math mimetypes multiprocessing netrc numbers operator
    os os.path pathlib pickle pkgutil platform plistlib pprint queue random re sched secrets select selectors shelve
    shlex shutil signal smtplib socket socketserver sqlite3 ssl stat statistics string struct subprocess sys sysconfig
    tarfile tempfile textwrap threading time timeit token tokenize traceback tracemalloc types typing unicodedata
    unittest unittest.mock urllib.parse urllib.request uuid wave weakref xml.dom.minidom xml.etree.ElementTree zipfile
    zipimport zlib zoneinfo
""".split()  # noqa: SIM905

SHORTEST, LONGEST = 30, 600  # characters of an answer
_SIGNATURE = re.compile(r"^[\w.]+\(.*?\)\s*(->|--|:|$)")


def cpt_rows() -> list[dict[str, str]]:
    """The language reference, one row a topic: its heading as title, the rest as text."""
    rows = []
    for key in sorted(topics):
        lines = [line.rstrip() for line in topics[key].strip().splitlines()]
        headed = len(lines) > 1 and bool(re.fullmatch(r"([*=~^#-])\1+", lines[1]))
        title, body = (lines[0], lines[2:]) if headed else (key, lines)
        rows.append({"title": title, "text": "\n".join(body).strip("\n")})
    return rows


def ift_rows() -> list[dict[str, list[dict[str, str]]]]:
    """Question-answer pairs, each question and each answer once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated members say so when they are looked at
        pairs = list(_pairs())
    asked, answered = set(QUESTIONS), {answer for question, answer in pairs if question in QUESTIONS}
    rows = []
    for question, answer in pairs:
        if question not in asked and answer not in answered:
            asked.add(question)
            answered.add(answer)
            rows.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
    return rows


def _pairs() -> Iterator[tuple[str, str]]:
    for name in MODULES:
        try:
            module = importlib.import_module(name)
        except ImportError:  # some builds of Python lack some modules
            continue
        prefix = "" if name == "builtins" else f"{name}."
        if prefix and (answer := _answer(module)):
            yield f"What is the {name} module in Python?", answer
        for member, value in _public(module):
            if (answer := _answer(value)) and _belongs(value, name):
                yield _question(prefix + member, value), answer
            if inspect.isclass(value) and _belongs(value, name) and not issubclass(value, BaseException):
                for method, function in _public(value):
                    if method in vars(value) and callable(function) and (answer := _answer(function)):
                        yield f"What does {prefix}{member}.{method} do in Python?", answer


def _public(owner: Any) -> Iterator[tuple[str, Any]]:
    for name in sorted(dir(owner)):
        value = None if name.startswith("_") else getattr(owner, name, None)
        if callable(value):
            yield name, value


def _belongs(value: Any, module: str) -> bool:
    """Whether `value` is made in this module: not a helper imported from elsewhere."""
    home = str(getattr(value, "__module__", None) or module)
    return home.lstrip("_").split(".")[0] in {module.split(".")[0], "posix", "posixpath", "genericpath"}


def _question(name: str, value: Any) -> str:
    return f"What is {name} in Python?" if inspect.isclass(value) else f"What does {name} do in Python?"


def _answer(value: Any) -> str | None:
    """The docstring's first paragraphs, as many as fit; None if it is no sentence in its own right."""
    doc = getattr(value, "__doc__", None)
    if not isinstance(doc, str):
        return None
    taken: list[str] = []
    for paragraph in inspect.cleandoc(doc).split("\n\n"):
        text = "\n".join(line.rstrip() for line in paragraph.strip("\n").splitlines())
        if not text or len("\n\n".join([*taken, text])) > LONGEST:
            break
        taken.append(text)
        if len(taken) == 2:
            break
    answer = "\n\n".join(taken).rstrip(":")
    fits = len(answer) >= SHORTEST and " " in answer and not _SIGNATURE.match(answer) and not answer.startswith(">>>")
    return answer if fits else None


def write_demo_data(folder: Path) -> dict[str, Path]:
    """Write cpt.jsonl and ift.jsonl; returns their paths under "cpt" and "ift"."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for kind, rows in (("cpt", cpt_rows()), ("ift", ift_rows())):
        paths[kind] = folder / f"{kind}.jsonl"
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        paths[kind].write_text(text, encoding="utf-8")
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the demo's data: cpt.jsonl and ift.jsonl.")
    parser.add_argument("folder", type=Path, help="where to write them")
    for kind, path in write_demo_data(parser.parse_args().folder).items():
        with open(path, encoding="utf-8") as file:
            print(f"{kind}: {sum(1 for _ in file)} rows, {path.stat().st_size:,} bytes, {path}")


if __name__ == "__main__":
    main()
