"""Text becomes ids and labels: BOS and EOS once, prompts masked, nothing lost."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from service.errors import JobFailure
from service.specs import parse_spec
from service.templates import render_generation
from tests.data_helpers import answers, data_spec, failure, ids_of, sentencepiece_tokenizer, texts, upload
from tests.tiny import BOS, EOS, make_tiny_tokenizer, stdlib_text
from worker.data import base_template, prepare, tokenise

CPT = {"prompt": "### {title}\n\n{text}"}
QA = {"prompt": "Question: {q}\nAnswer: ", "response": "{a}"}
CHAT = {"chat_template": "default"}
ASK = "{% if add_generation_prompt %}assistant: {% endif %}"
ROWS = [{"title": f"title {i}", "text": f"some text {i} " * (i % 5 + 1)} for i in range(40)]
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is a list?"},
    {"role": "assistant", "content": "A sequence."},
    {"role": "user", "content": "And a tuple?"},
    {"role": "assistant", "content": "\n\nAn immutable one."},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory)


def make_folder(factory: pytest.TempPathFactory) -> Path:
    folder = factory.mktemp("tokenizer")
    make_tiny_tokenizer(folder)
    return folder


@pytest.fixture
def tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def without_bos(tokenizer: Any) -> Any:
    """The same tokenizer with a convention of no BOS."""
    from tokenizers import processors

    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
    return tokenizer


# BOS and EOS


def test_a_text_has_bos_and_eos_exactly_once(tokenizer: Any, tmp_path: Path) -> None:
    data = prepare(data_spec("cpt", CPT, size=512), tokenizer, file=upload(tmp_path, ROWS))
    for ids in data.train["input_ids"]:
        assert ids[0] == tokenizer.bos_token_id
        assert ids[-1] == tokenizer.eos_token_id
        assert ids.count(tokenizer.bos_token_id) == ids.count(tokenizer.eos_token_id) == 1


def test_a_text_that_brings_its_own_bos_and_eos_gets_no_second(tokenizer: Any, tmp_path: Path) -> None:
    file = upload(tmp_path, [{"text": f"{BOS}hello{EOS}\n"}, {"text": "hello"}])
    data = prepare(data_spec("cpt", {"prompt": "{text}"}), tokenizer, file=file)
    assert texts(data, tokenizer) == [f"{BOS}hello{EOS}"] * 2
    written = prepare(
        data_spec("cpt", {"prompt": BOS + "{text}" + EOS}), tokenizer, file=upload(tmp_path, [{"text": "hello"}])
    )
    assert texts(written, tokenizer) == [f"{BOS}hello{EOS}"]
    assert render_generation(written.template, inputs={"text": "x"}) == f"{BOS}x{EOS}"


def test_no_bos_where_the_tokenizer_adds_none(tokenizer: Any, tmp_path: Path) -> None:
    data = prepare(data_spec("cpt", CPT, size=512), without_bos(tokenizer), file=upload(tmp_path, ROWS))
    assert texts(data, tokenizer)[0] == f"### title 0\n\nsome text 0 {EOS}"
    assert data.template.bos == data.template.raw_bos == ""


@pytest.mark.parametrize("responses_only", [False, True])
def test_a_conversation_has_bos_once_and_ends_with_eos_once(
    tokenizer: Any, tmp_path: Path, responses_only: bool
) -> None:
    # The template writes the BOS itself, and the tokenizer would add another.
    spec = data_spec("ift", CHAT, size=512, responses_only=responses_only)
    data = prepare(spec, tokenizer, file=upload(tmp_path, [{"messages": TALK}]))
    ids = data.train[0]["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id
    assert ids[-2] != tokenizer.eos_token_id
    assert data.template.bos == ""
    assert data.template.raw_bos == BOS


def test_a_chat_template_without_bos_gets_the_tokenizers(tokenizer: Any, tmp_path: Path) -> None:
    jinja = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}" + ASK
    data = prepare(
        data_spec("ift", {"chat_template": jinja}), tokenizer, file=upload(tmp_path, [{"messages": TALK[1:3]}])
    )
    assert texts(data, tokenizer) == [f"{BOS}user: What is a list?\nassistant: A sequence.\n{EOS}"]
    assert render_generation(data.template, messages=TALK[1:2]) == f"{BOS}user: What is a list?\nassistant: "


def test_a_line_break_after_the_end_token_is_left_out(tokenizer: Any, tmp_path: Path) -> None:
    jinja = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token + '\n' }}{% endfor %}" + ASK
    spec = data_spec("ift", {"chat_template": jinja}, size=512, responses_only=True)
    data = prepare(spec, tokenizer, file=upload(tmp_path, [{"messages": TALK}]))
    assert texts(data, tokenizer)[0].endswith(f"An immutable one.{EOS}")
    assert answers(data.train[0], tokenizer) == [f"A sequence.{EOS}", f"\n\nAn immutable one.{EOS}"]


def test_what_a_template_writes_after_the_last_eos_is_left_out(tokenizer: Any, tmp_path: Path) -> None:
    jinja = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token + '\n---\n' }}{% endfor %}" + ASK
    data = prepare(
        data_spec("ift", {"chat_template": jinja}), tokenizer, file=upload(tmp_path, [{"messages": TALK[1:3]}])
    )
    assert texts(data, tokenizer) == [f"{BOS}user: What is a list?{EOS}\n---\nassistant: A sequence.{EOS}"]


def test_a_turns_own_end_token_is_trained_and_stops_too(tokenizer: Any, tmp_path: Path) -> None:
    jinja = (
        "{{ bos_token }}{% for m in messages %}{{ m.role + ': ' + m.content + '<|eot_id|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    spec = data_spec("ift", {"chat_template": jinja}, size=512, responses_only=True)
    data = prepare(spec, tokenizer, file=upload(tmp_path, [{"messages": TALK}]))
    assert answers(data.train[0], tokenizer) == [
        "A sequence.<|eot_id|>",
        f"\n\nAn immutable one.<|eot_id|>\n{EOS}",
    ]
    assert data.template.stop == [EOS, "<|eot_id|>"]
    assert data.train[0]["input_ids"].count(tokenizer.eos_token_id) == 1


# Masks


def test_labels_are_the_ids_where_all_is_trained(tokenizer: Any, tmp_path: Path) -> None:
    for spec, rows in (
        (data_spec("cpt", CPT), ROWS),
        (data_spec("ift", QA), [{"q": "why?", "a": "so"}]),
        (data_spec("ift", CHAT), [{"messages": TALK}]),
    ):
        data = prepare(spec, tokenizer, file=upload(tmp_path, rows))
        assert data.train["labels"][:] == data.train["input_ids"][:]


def test_only_the_response_and_its_eos_are_trained(tokenizer: Any, tmp_path: Path) -> None:
    spec = data_spec("ift", QA, responses_only=True)
    data = prepare(spec, tokenizer, file=upload(tmp_path, [{"q": "why?", "a": "so"}]))
    row = data.train[0]
    prompt = ids_of(tokenizer, f"{BOS}Question: why?\nAnswer: ")
    assert row["input_ids"][: len(prompt)] == prompt
    assert row["labels"] == [-100] * len(prompt) + ids_of(tokenizer, f"so{EOS}")
    assert data.report["trained_tokens"] == len(row["labels"]) - len(prompt)


def test_every_answer_of_a_conversation_is_trained_and_nothing_else(tokenizer: Any, tmp_path: Path) -> None:
    spec = data_spec("ift", CHAT, size=512, responses_only=True)
    row = prepare(spec, tokenizer, file=upload(tmp_path, [{"messages": TALK}])).train[0]
    # This chat template trims, so the answer's own line breaks are not there.
    assert answers(row, tokenizer) == [f"A sequence.{EOS}", f"An immutable one.{EOS}"]
    assert all(label in (-100, i) for i, label in zip(row["input_ids"], row["labels"], strict=True))


def test_an_answer_that_repeats_the_question_is_told_from_it(tokenizer: Any, tmp_path: Path) -> None:
    talk = [{"role": r, "content": "yes"} for r in ("user", "assistant", "user", "assistant")]
    spec = data_spec("ift", CHAT, size=512, responses_only=True)
    row = prepare(spec, tokenizer, file=upload(tmp_path, [{"messages": talk}])).train[0]
    assert answers(row, tokenizer) == [f"yes{EOS}", f"yes{EOS}"]
    masked = [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100]
    assert tokenizer.decode(masked).count("yes") == 2


def test_a_template_that_rewrites_earlier_turns_is_reported_by_row(tokenizer: Any, tmp_path: Path) -> None:
    jinja = (
        "{{ messages | length }}{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    rows = [{"messages": TALK}, {"messages": TALK[:3]}]
    e = failure(data_spec("ift", {"chat_template": jinja}, responses_only=True), tokenizer, upload(tmp_path, rows))
    assert e.code == "invalid_data"
    assert [row["row"] for row in e.rows] == [1, 2]
    assert (
        "messages.2: the chat template does not write this answer behind its own generation prompt"
        in e.rows[0]["reason"]
    )


# Parity with generation


def test_the_training_ids_begin_with_what_the_engine_gets(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"q": "why?", "a": "\n\nso it is"}, {"q": "how\n\n", "a": " thus"}]
    data = prepare(data_spec("ift", QA), tokenizer, file=upload(tmp_path, rows))
    for row, ids in zip(rows, data.train["input_ids"], strict=True):
        prompt = render_generation(data.template, inputs={"q": row["q"]})
        assert ids == ids_of(tokenizer, prompt) + ids_of(tokenizer, row["a"] + EOS)


def test_a_conversations_ids_begin_with_what_the_engine_gets(tokenizer: Any, tmp_path: Path) -> None:
    data = prepare(data_spec("ift", CHAT, size=512), tokenizer, file=upload(tmp_path, [{"messages": TALK}]))
    prompt = render_generation(data.template, messages=TALK[:-1])
    assert data.train[0]["input_ids"] == ids_of(tokenizer, prompt) + ids_of(tokenizer, f"An immutable one.{EOS}")
    first = render_generation(data.template, messages=TALK[:2])
    masked = prepare(
        data_spec("ift", CHAT, size=512, responses_only=True), tokenizer, file=upload(tmp_path, [{"messages": TALK}])
    )
    assert masked.train[0]["input_ids"][: len(ids_of(tokenizer, first))] == ids_of(tokenizer, first)


def test_a_sentencepiece_tokenizer_puts_no_space_before_an_answer(tmp_path: Path) -> None:
    tokenizer = sentencepiece_tokenizer()
    data = prepare(
        data_spec("ift", QA, responses_only=True), tokenizer, file=upload(tmp_path, [{"q": "why", "a": "return it"}])
    )
    row = data.train[0]
    prompt = ids_of(tokenizer, render_generation(data.template, inputs={"q": "why"}))
    assert row["input_ids"][: len(prompt)] == prompt
    whole = ids_of(tokenizer, "<s>Question: why\nAnswer: return it</s>")
    assert tokenizer.decode(row["input_ids"]) == tokenizer.decode(whole)
    assert tokenizer.convert_ids_to_tokens(row["labels"][len(prompt)]) != "▁return"


# Windows and truncation


def test_windows_lose_nothing(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"text": text} for text in stdlib_text(60_000)]
    data = prepare(data_spec("cpt", {"prompt": "{text}"}, size=50), tokenizer, file=upload(tmp_path, rows))
    joined = [i for ids in data.train["input_ids"] for i in ids]
    expected = [i for row in rows for i in ids_of(tokenizer, BOS + row["text"] + EOS)]
    assert joined == expected
    assert data.report["windows"] == len(data.train) > len(rows)
    assert data.report["train_tokens"] == len(expected)
    assert max(len(ids) for ids in data.train["input_ids"]) == 50
    # BOS begins a text, not a window.
    assert joined.count(tokenizer.bos_token_id) == joined.count(tokenizer.eos_token_id) == len(rows)


@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 18, 31, 32, 33, 34, 160, 161])
def test_no_window_has_a_single_token(tokens: int) -> None:
    parts = tokenise.windows(np.arange(tokens, dtype=np.int32), 16)
    assert np.concatenate(parts).tolist() == list(range(tokens))
    assert max(len(part) for part in parts) <= 16
    assert tokens == 1 or min(len(part) for part in parts) >= 2


@pytest.mark.parametrize("kind", ["byte level", "sentencepiece"])
def test_a_very_long_text_in_pieces_has_the_tokens_of_the_whole(
    kind: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "sentencepiece":
        tokenizer = sentencepiece_tokenizer()
    monkeypatch.setattr(tokenise, "PIECE", 1000)
    words = random.Random(0).sample("\n".join(stdlib_text(200_000)).split(), 3000)
    text = " ".join(words) + "한국어" * 800 + "\n\n    \n".join(words)
    data = prepare(data_spec("cpt", {"prompt": "{text}"}), tokenizer, file=upload(tmp_path, [{"text": text}]))
    joined = [i for ids in data.train["input_ids"] for i in ids]
    assert joined == ids_of(tokenizer, tokenizer.bos_token + text + tokenizer.eos_token)


def test_long_instruction_rows_are_truncated_and_counted(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"q": "a", "a": "b " * 100}, {"q": "a " * 100, "a": "b"}, {"q": "a", "a": "b"}]
    data = prepare(data_spec("ift", QA, size=32, responses_only=True), tokenizer, file=upload(tmp_path, rows))
    # The second has no trained token within 32.
    assert len(data.train) == data.report["train_rows"] == 2
    assert data.report["truncated_rows"] == 2
    assert data.report["dropped_rows"] == 1
    assert len(data.train[0]["input_ids"]) == 32
    assert data.report["longest"] > 100


def test_only_rows_without_a_trained_token_is_an_error(tokenizer: Any, tmp_path: Path) -> None:
    file = upload(tmp_path, [{"q": "a " * 100, "a": "b"}] * 3)
    e = failure(data_spec("ift", QA, size=32, responses_only=True), tokenizer, file)
    assert e.code == "invalid_data"
    assert "3 rows have no trained token within model.max_seq_length 32" in e.message


# Split, sampling, fingerprint


def test_the_split_is_that_of_datasets(tokenizer: Any, tmp_path: Path) -> None:
    import datasets

    spec = data_spec("cpt", {"prompt": "{text}"}, size=512, test_size=0.2, max_samples=30, seed=7)
    rows = [{"text": f"row {i}"} for i in range(50)]
    data = prepare(spec, tokenizer, file=upload(tmp_path, rows))
    expected = (
        datasets.Dataset.from_list(rows).shuffle(seed=7).select(range(30)).train_test_split(test_size=0.2, seed=7)
    )
    assert texts(data, tokenizer) == [f"{BOS}{text}{EOS}" for text in expected["train"]["text"]]
    assert [tokenizer.decode(ids) for ids in data.eval["input_ids"]] == [
        f"{BOS}{t}{EOS}" for t in expected["test"]["text"]
    ]
    assert (data.report["rows"], data.report["train_rows"], data.report["eval_rows"]) == (30, 24, 6)


def test_the_same_spec_gives_the_same_fingerprint_and_each_change_another(tokenizer: Any, tmp_path: Path) -> None:
    file = upload(tmp_path, ROWS)
    base: dict[str, Any] = {"test_size": 5, "seed": 1}
    first = prepare(data_spec("cpt", CPT, **base), tokenizer, file=file)
    again = prepare(data_spec("cpt", CPT, **base), tokenizer, file=file)
    assert (first.fingerprint, first.report) == (again.fingerprint, again.report)
    assert first.train[:] == again.train[:]
    others = [
        prepare(data_spec("cpt", CPT, **base | {"seed": 2}), tokenizer, file=file),
        prepare(data_spec("cpt", CPT, **base | {"test_size": 6}), tokenizer, file=file),
        prepare(data_spec("cpt", CPT, size=32, **base), tokenizer, file=file),
        prepare(data_spec("cpt", {"prompt": "{text}"}, **base), tokenizer, file=file),
    ]
    assert len({x.fingerprint for x in [first, *others]}) == 5


def test_masks_are_in_the_fingerprint(tokenizer: Any, tmp_path: Path) -> None:
    file = upload(tmp_path, [{"q": "why?", "a": "so"}])
    both = [prepare(data_spec("ift", QA, responses_only=only), tokenizer, file=file) for only in (False, True)]
    assert both[0].train["input_ids"][:] == both[1].train["input_ids"][:]
    assert both[0].fingerprint != both[1].fingerprint


@pytest.mark.parametrize(
    ("test_size", "train", "held"), [(1, 4, 1), (4, 1, 4), (0.01, 4, 1), (0.5, 2, 3), (0.99, 1, 4), (0, 5, 0)]
)
def test_each_side_of_a_split_has_a_row(
    test_size: float, train: int, held: int, tokenizer: Any, tmp_path: Path
) -> None:
    data = prepare(data_spec("cpt", CPT, test_size=test_size), tokenizer, file=upload(tmp_path, ROWS[:5]))
    assert (data.report["train_rows"], data.report["eval_rows"]) == (train, held)
    assert (data.eval is None) == (held == 0)


@pytest.mark.parametrize(("rows", "test_size"), [(1, 0.01), (1, 1), (5, 5), (5, 50)])
def test_too_few_rows_to_split_is_an_error(rows: int, test_size: float, tokenizer: Any, tmp_path: Path) -> None:
    e = failure(data_spec("cpt", CPT, test_size=test_size), tokenizer, upload(tmp_path, ROWS[:rows]))
    assert e.code == "invalid_data"
    assert "too few for dataset.test_size" in e.message


# Templates against tokenizers


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ({"prompt": "no column"}, "names no column"),
        ({"prompt": "{text"}, "dataset.template.prompt: '{' at character 1"),
        ({"chat_template": "{% for %}"}, "chat template, line 1"),
    ],
)
def test_a_template_that_cannot_work_is_an_invalid_spec(
    template: dict[str, str], message: str, tokenizer: Any, tmp_path: Path
) -> None:
    e = failure(data_spec("cpt", template), tokenizer, upload(tmp_path, ROWS))
    assert e.code == "invalid_spec"
    assert message in e.message


def test_default_needs_a_model_with_a_chat_template(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = None
    e = failure(data_spec("ift", CHAT), tokenizer, upload(tmp_path, [{"messages": TALK}]))
    assert e.code == "invalid_spec"
    assert "tokenizer has none" in e.message


def test_a_tokenizer_without_eos_is_an_invalid_spec(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.eos_token = None
    assert failure(data_spec("cpt", CPT), tokenizer, upload(tmp_path, ROWS)).code == "invalid_spec"


def test_the_bases_own_template_is_its_chat_template_or_a_bare_prompt(tokenizer: Any) -> None:
    assert render_generation(base_template(tokenizer), messages=TALK[1:2]).startswith(f"{BOS}<|start_header_id|>user")
    assert render_generation(base_template(tokenizer), prompt="x") == f"{BOS}x"
    tokenizer.chat_template = None
    assert render_generation(base_template(tokenizer), messages=TALK[1:2]) == f"{BOS}What is a list?"


# Rows of one's own to evaluate on, and answers that are left out


def test_another_upload_can_be_what_is_evaluated_on(tokenizer: Any, tmp_path: Path) -> None:
    rows = upload(tmp_path, [{"text": f"train {n}"} for n in range(6)])
    held = upload(tmp_path, [{"text": f"held {n}"} for n in range(3)], "held.jsonl")
    spec = data_spec("cpt", {"prompt": "{text}"}, test_size=..., eval_file_id="file_2", max_samples=4)
    data = prepare(spec, tokenizer, file=rows, eval_file=held)
    assert (len(data.train), len(data.eval)) == (4, 3)
    assert all("train" in text for text in texts(data, tokenizer))
    assert all("held" in tokenizer.decode(row["input_ids"]) for row in data.eval)
    assert (data.report["train_rows"], data.report["eval_rows"]) == (4, 3)


@pytest.mark.parametrize("max_samples", [None, 3])
def test_a_text_beside_an_evaluation_upload_is_counted_whole(
    tokenizer: Any, tmp_path: Path, max_samples: int | None
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"word{n}" for n in range(400)))
    held = upload(tmp_path, [{"text": "short"}], "held.jsonl")
    spec = data_spec("cpt", {"prompt": "{text}"}, test_size=..., eval_file_id="file_2", max_samples=max_samples)
    report = prepare(spec, tokenizer, file=text, eval_file=held).report
    alone = prepare(data_spec("cpt", {"prompt": "{text}"}, max_samples=max_samples), tokenizer, file=text).report
    assert report["longest"] == alone["longest"] > 64
    assert report["rows"] == alone["rows"] + 1
    assert report["train_rows"] == alone["train_rows"]
    assert max_samples in (None, report["train_rows"])


def test_a_bad_row_of_the_evaluation_upload_is_named_as_its(tokenizer: Any, tmp_path: Path) -> None:
    rows = upload(tmp_path, [{"text": "fine"}] * 3)
    held = upload(tmp_path, [{"text": "fine"}, {"text": ""}], "held.jsonl")
    spec = data_spec("cpt", {"prompt": "{text}"}, test_size=..., eval_file_id="file_2")
    with pytest.raises(JobFailure) as e:
        prepare(spec, tokenizer, file=rows, eval_file=held)
    assert e.value.code == "invalid_data"
    assert e.value.message.startswith("dataset.eval_file_id: ")
    assert [row["row"] for row in e.value.rows] == [2]


@pytest.mark.parametrize(
    ("dataset", "wrong"),
    [
        ({"path": "o/s"}, "eval_file_id: goes with file_id"),
        ({"file_id": "f", "test_size": 2}, "test_size: eval_file_id"),
    ],
)
def test_evaluation_rows_come_from_one_place(dataset: dict[str, Any], wrong: str) -> None:
    spec = {"kind": "cpt", "adapter": "x", "dataset": {**dataset, "eval_file_id": "g", "template": {"prompt": "{t}"}}}
    with pytest.raises(ValidationError, match=wrong):
        parse_spec(spec)


def test_an_answer_of_weight_0_is_read_but_not_trained(tokenizer: Any, tmp_path: Path) -> None:
    def talk(*weights: int | None) -> dict[str, Any]:
        turns: list[dict[str, Any]] = []
        for n, weight in enumerate(weights):
            turns += [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}", "weight": weight}]
        return {"messages": turns}

    spec = data_spec("ift", {"chat_template": "default"}, responses_only=True, size=512)
    rows = upload(tmp_path, [talk(None, 1, None), talk(0, 1, None), talk(None, 0, 1), talk(1, None, 0)])
    data = prepare(spec, tokenizer, file=rows)
    trained = [["".join(a).replace(tokenizer.eos_token, "") for a in answers(row, tokenizer)] for row in data.train]
    assert trained == [["a0", "a1", "a2"], ["a1", "a2"], ["a0", "a2"], ["a0", "a1"]]
    assert "a1" in texts(data, tokenizer)[2]
    assert "a2" not in texts(data, tokenizer)[3]
    none = failure(spec, tokenizer, upload(tmp_path, [talk(0, 0)]))
    assert "weight 0" in none.rows[0]["reason"]
    odd = failure(spec, tokenizer, upload(tmp_path, [talk(2)]))
    assert "messages.1.weight is 2" in odd.rows[0]["reason"]
