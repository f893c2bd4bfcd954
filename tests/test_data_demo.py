"""The demo's data: real text of the standard library, the same each time, and good enough to train on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.data_helpers import data_spec
from tests.tiny import make_tiny_tokenizer
from worker.data import prepare

SCRIPT = Path(__file__).parent.parent / "scripts" / "demo_data.py"


def write(folder: Path, seed: str) -> dict[str, str]:
    env = {**os.environ, "PYTHONHASHSEED": seed}
    subprocess.run([sys.executable, str(SCRIPT), str(folder)], env=env, check=True, capture_output=True, timeout=120)
    return {path.name: path.read_text("utf-8") for path in folder.iterdir()}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    write(folder, "1")
    return folder


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_the_demo_data_are_the_same_each_time(demo: Path, tmp_path: Path) -> None:
    assert write(tmp_path, "2") == {path.name: path.read_text("utf-8") for path in demo.iterdir()}


def test_the_language_reference_is_whole(demo: Path) -> None:
    from pydoc_data.topics import topics

    written = rows(demo / "cpt.jsonl")
    assert len(written) == len(topics)
    for row, key in zip(written, sorted(topics), strict=True):
        lines = [line.rstrip() for line in topics[key].strip().splitlines()]
        assert row["title"]
        assert row["text"] in "\n".join(lines)
        # Nothing but the heading, which is the title, and its underline is left out of the text.
        assert len("\n".join(lines)) - len(row["text"]) <= 2 * len(row["title"]) + 4


def test_questions_and_answers_are_unique_and_of_sensible_length(demo: Path) -> None:
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        from demo_data import QUESTIONS
    finally:
        sys.path.remove(str(SCRIPT.parent))
    pairs = [tuple(m["content"] for m in row["messages"]) for row in rows(demo / "ift.jsonl")]
    questions, answers = zip(*pairs, strict=True)
    assert 1500 < len(pairs) < 6000
    assert len(set(questions)) == len(set(answers)) == len(pairs)
    assert all(30 <= len(answer) <= 600 for answer in answers)
    assert not set(QUESTIONS) & set(questions)
    assert len(QUESTIONS) == 4


def test_the_demo_data_prepare_without_a_bad_row(demo: Path, tmp_path: Path) -> None:
    tokenizer = make_tiny_tokenizer(tmp_path)
    cpt = data_spec("cpt", {"prompt": "# {title}\n\n{text}"}, size=256, test_size=0.05)
    ift = data_spec("ift", {"chat_template": "default"}, size=256, responses_only=True, test_size=0.05)
    first = prepare(cpt, tokenizer, file=demo / "cpt.jsonl").report
    second = prepare(ift, tokenizer, file=demo / "ift.jsonl").report
    assert first["windows"] > first["rows"] > 60
    assert second["dropped_rows"] == 0
    assert 0 < second["trained_tokens"] < second["train_tokens"]
