"""Uploads in every format, and every way in which a row can be malformed: by number and reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data_helpers import data_spec, failure, sentencepiece_tokenizer, texts, upload
from tests.tiny import BOS, EOS, make_tiny_tokenizer
from worker.data import prepare

CPT = {"prompt": "{title}: {text}"}
QA = {"prompt": "{q} {context}", "response": "{a}"}
CHAT = {"chat_template": "default"}
GOOD = {"title": "a", "text": "b"}
ROWS = [{"title": f"t{i}", "text": f'wörld {i}, "quoted"\nand broken'} for i in range(5)]
EXPECTED = [f"{BOS}{row['title']}: {row['text']}{EOS}" for row in ROWS]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def write(folder: Path, name: str, content: bytes | str) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def csv_text(rows: list[dict[str, str]]) -> str:
    cells = [list(rows[0]), *([*row.values()] for row in rows)]
    return "".join(",".join('"' + cell.replace('"', '""') + '"' for cell in line) + "\r\n" for line in cells)


def write_as(name: str, folder: Path) -> Path:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    content = {
        "rows.jsonl": lines,
        "blank lines.jsonl": "\n" + lines.replace("\n", "\n\n"),
        "byte order mark.jsonl": "\ufeff" + lines,
        "list.json": json.dumps(ROWS, indent=1),
        "data.json": json.dumps({"version": 1, "data": ROWS}),
        "lines.json": lines,
        "rows.csv": csv_text(ROWS),
        "byte order mark.csv": "\ufeff" + csv_text(ROWS),
    }
    if name in content:
        return write(folder, name, content[name])
    pq.write_table(pa.Table.from_pylist([{**row, "other": [1]} for row in ROWS]), folder / name)
    return folder / name


@pytest.mark.parametrize(
    "name",
    ["rows.jsonl", "blank lines.jsonl", "byte order mark.jsonl", "list.json", "data.json", "lines.json", "rows.csv",
     "byte order mark.csv", "rows.parquet", "ROWS.PARQUET"],
)  # fmt: skip
def test_each_format_gives_the_same_rows(name: str, tokenizer: Any, tmp_path: Path) -> None:
    data = prepare(data_spec("cpt", CPT), tokenizer, file=write_as(name, tmp_path))
    assert texts(data, tokenizer) == EXPECTED
    assert data.report["rows"] == 5
    assert set(data.report["columns"]) >= {"title", "text"}


def test_a_txt_file_is_one_text_whose_windows_are_split(tokenizer: Any, tmp_path: Path) -> None:
    text = "One paragraph.\r\n\r\nAnother one, 한국어.\n" * 30
    file = write(tmp_path, "book.txt", "\ufeff" + text)
    data = prepare(data_spec("cpt", {"prompt": "{text}"}, size=32), tokenizer, file=file)
    assert tokenizer.decode([i for ids in data.train["input_ids"] for i in ids]) == BOS + text + EOS
    halves = prepare(data_spec("cpt", {"prompt": "{text}"}, size=32, test_size=0.25), tokenizer, file=file)
    assert halves.report["eval_rows"] == -(-len(data.train) // 4)
    windows = sorted([*halves.train["input_ids"], *halves.eval["input_ids"]])
    assert windows == sorted(data.train["input_ids"])
    few = prepare(data_spec("cpt", {"prompt": "{text}"}, size=32, max_samples=3), tokenizer, file=file)
    assert len(few.train) == 3


def test_a_txt_file_is_no_instruction_data(tokenizer: Any, tmp_path: Path) -> None:
    e = failure(data_spec("ift", {"prompt": "{text}", "response": "{text}"}), tokenizer, write(tmp_path, "a.txt", "x"))
    assert e.code == "invalid_data"
    e = failure(data_spec("cpt", CPT), tokenizer, write(tmp_path, "a.txt", "x"))
    assert "'title'" in e.message
    assert "those there: text" in e.message


# Rows that are wrong, by number and reason


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"title": "a", "text": "b"', "malformed JSON: Expecting ',' delimiter at character"),
        (b"title: a", "malformed JSON: Expecting value at character 1"),
        (b'{"title": "a", "text": "b"} {}', "malformed JSON: Extra data at character 29"),
        (b"[1, 2]", "a list, expected an object"),
        (b'"text"', "text, expected an object"),
        (b"null", "null, expected an object"),
        (b"true", "a boolean, expected an object"),
        (b"3", "a number, expected an object"),
        (b'{"title": "a", "text": "caf\xe9"}', "not UTF-8: byte 0xe9 at byte 28 of the line"),
        (b'{"title": "a", "text": "\\ud800"}', "half a surrogate pair"),
        (b"[" * 100_000, "malformed JSON: "),
        (b'{"title": ' + b"9" * 5000 + b"}", "malformed JSON: "),
        (b'{"title": "a"}', "column 'text' is missing"),
        (b'{"title": "a", "text": null}', "column 'text' is null"),
        (b'{"title": "a", "text": ""}', "column 'text' is empty"),
        (b'{"title": "a", "text": " \\n"}', "column 'text' is empty"),
        (b'{"title": "a", "text": ["b"]}', "column 'text' is a list, expected text"),
        (b'{"title": {"a": 1}, "text": "b"}', "column 'title' is an object, expected text"),
    ],
)
def test_a_malformed_line_is_named_by_number_and_reason(
    line: bytes, reason: str, tokenizer: Any, tmp_path: Path
) -> None:
    good = json.dumps(GOOD).encode()
    file = write(tmp_path, "rows.jsonl", b"\n".join([good, b"", line, good]) + b"\n")
    e = failure(data_spec("cpt", CPT), tokenizer, file)
    assert e.code == "invalid_data"
    assert [row["row"] for row in e.rows] == [3]
    assert reason in e.rows[0]["reason"]
    assert e.message.startswith("1 row is malformed, first row 3: ")
    assert not e.retry


def test_all_malformed_rows_are_counted_and_a_hundred_listed(tokenizer: Any, tmp_path: Path) -> None:
    rows = [GOOD if i % 2 else {"title": "a", "text": 3 * [i]} for i in range(400)]
    e = failure(data_spec("cpt", CPT, max_samples=1), tokenizer, upload(tmp_path, rows))
    assert "200 rows are malformed" in e.message
    assert [row["row"] for row in e.rows] == [2 * i + 1 for i in range(100)]


def test_numbers_and_booleans_are_text_too(tokenizer: Any, tmp_path: Path) -> None:
    data = prepare(data_spec("cpt", CPT), tokenizer, file=upload(tmp_path, [{"title": 3, "text": 2.5}]))
    assert texts(data, tokenizer) == [f"{BOS}3: 2.5{EOS}"]


def test_a_csv_row_is_named_by_the_line_it_begins_on(tokenizer: Any, tmp_path: Path) -> None:
    content = b'title,text\n"a","two\nlines"\nb\nc,d,e\n"f",""\ng,h\xff\n\n"i"x,j\nk,"l\nm\n'
    e = failure(data_spec("cpt", CPT), tokenizer, write(tmp_path, "rows.csv", content))
    assert {row["row"]: row["reason"] for row in e.rows} == {
        4: "1 cell, the header has 2",
        5: "3 cells, the header has 2",
        6: "column 'text' is empty",
        7: "not UTF-8: byte 0xff at byte 4 of the line",
        9: "malformed CSV: ',' expected after '\"'",
        10: "malformed CSV: unexpected end of data",
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [("a,a\n1,2\n", "names a column twice: a"), ("title;text\na;b\n", "those there: title;text")],
)
def test_a_csv_header_that_does_not_fit_is_named(content: str, message: str, tokenizer: Any, tmp_path: Path) -> None:
    e = failure(data_spec("cpt", CPT), tokenizer, write(tmp_path, "rows.csv", content))
    assert e.code == "invalid_data"
    assert message in e.message


@pytest.mark.parametrize(
    ("content", "row", "reason"),
    [
        (
            b'[{"title": "a", "text": "b"},\n {"title": "a" "text": "b"}]',
            2,
            "Expecting ',' delimiter (line 2, column 16)",
        ),
        (b'[{"title": "a", "text": "b"},\n {"title": "a", "text": "b"}', 2, "(line 2, column 29)"),
        (b'[{"title": "a", "text": "b"}, 7]', 2, "a number, expected an object"),
        (b'[\n{"title": "a", "text": "caf\xe9"}]', 2, "not UTF-8: byte 0xe9 at byte 28 of the line"),
        (b'{"data": [\n{"title": }]}', 2, "Expecting value (line 2, column 11)"),
        (b'[{"title": "a", "text": "b"}, {"title": "a"}]', 2, "column 'text' is missing"),
    ],
)
def test_a_malformed_json_file_names_the_row(
    content: bytes, row: int, reason: str, tokenizer: Any, tmp_path: Path
) -> None:
    e = failure(data_spec("cpt", CPT), tokenizer, write(tmp_path, "rows.json", content))
    assert e.code == "invalid_data"
    assert [r["row"] for r in e.rows] == [row]
    assert reason in e.rows[0]["reason"]


@pytest.mark.parametrize("content", [b"3", b'"text"', b"null", b"[" * 100_000])
def test_a_json_file_of_another_shape_is_refused(content: bytes, tokenizer: Any, tmp_path: Path) -> None:
    assert failure(data_spec("cpt", CPT), tokenizer, write(tmp_path, "rows.json", content)).code == "invalid_data"


def test_a_broken_parquet_file_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    file = write_as("rows.parquet", tmp_path)
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"PAR1", whole[:20] + b"\xff" * 60 + whole[80:]):
        e = failure(data_spec("cpt", CPT), tokenizer, write(tmp_path, "broken.parquet", content))
        assert e.code == "invalid_data"
        assert "parquet" in e.message or e.rows


def test_rows_of_a_parquet_file_are_named_by_number(tokenizer: Any, tmp_path: Path) -> None:
    bad = pa.array([b"a", b"b\xff", b"c", None], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"title": ["a", "b", "c", "d"], "text": bad}), tmp_path / "rows.parquet")
    e = failure(data_spec("cpt", CPT), tokenizer, tmp_path / "rows.parquet")
    assert [(row["row"], row["reason"].split(":")[0]) for row in e.rows] == [
        (2, "not UTF-8"),
        (4, "column 'text' is null"),
    ]


# Sets that are wrong as a whole


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.txt"])
@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_set_is_an_error(name: str, content: str, tokenizer: Any, tmp_path: Path) -> None:
    e = failure(data_spec("cpt", {"prompt": "{text}"}), tokenizer, write(tmp_path, name, content))
    assert e.code == "invalid_data"
    assert e.message == "the set has no rows"


@pytest.mark.parametrize(
    ("name", "content"), [("rows.json", "[]"), ("rows.json", '{"data": []}'), ("rows.csv", "title,text\n")]
)
def test_a_set_without_rows_is_an_error(name: str, content: str, tokenizer: Any, tmp_path: Path) -> None:
    assert failure(data_spec("cpt", CPT), tokenizer, write(tmp_path, name, content)).message == "the set has no rows"


@pytest.mark.parametrize("name", ["rows.jsonl", "list.json", "rows.csv", "rows.parquet"])
def test_a_missing_column_is_named_with_those_there(name: str, tokenizer: Any, tmp_path: Path) -> None:
    file = write_as(name, tmp_path)
    e = failure(data_spec("cpt", {"prompt": "{headline}: {text}"}), tokenizer, file)
    assert e.code == "invalid_data"
    assert "names the column 'headline', which the data do not have" in e.message
    assert e.message.endswith("text, title")
    e = failure(data_spec("ift", CHAT), tokenizer, file)
    assert "messages or conversations" in e.message


def test_an_upload_that_is_gone_or_of_another_kind_is_an_error(tokenizer: Any, tmp_path: Path) -> None:
    assert "no longer there" in failure(data_spec("cpt", CPT), tokenizer, tmp_path / "none.jsonl").message
    assert ".jsonl, .json, .csv" in failure(data_spec("cpt", CPT), tokenizer, write(tmp_path, "a.xlsx", "x")).message


# Instructions and conversations


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"q": "", "context": " ", "a": "x"}, "columns q, context are all empty"),
        ({"q": "x", "context": "", "a": ""}, "column 'a' is empty"),
        ({"q": "x", "context": None, "a": "y"}, "column 'context' is null"),
        ({"q": "x", "context": ""}, "column 'a' is missing"),
    ],
)
def test_an_instruction_needs_a_question_and_an_answer(
    row: dict[str, Any], reason: str, tokenizer: Any, tmp_path: Path
) -> None:
    fine = {"q": "x", "context": "", "a": "y"}
    e = failure(data_spec("ift", QA), tokenizer, upload(tmp_path, [fine, row]))
    assert e.rows == [{"row": 2, "reason": reason}]


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


ANSWER = {"role": "assistant", "content": "y"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": None}, "column 'messages' is null"),
        ({"other": 1}, "columns messages and conversations are both missing"),
        ({"messages": []}, "column 'messages' is empty"),
        ({"messages": 3}, "column 'messages' is a number, expected a list of messages"),
        ({"messages": "hello"}, "column 'messages' is text that is not JSON"),
        ({"messages": ["hello"]}, "messages.0 is text, expected an object"),
        ({"messages": [{"content": "x"}, ANSWER]}, "messages.0.role is missing or not text"),
        ({"messages": [user(None), ANSWER]}, "messages.0.content is missing or null"),
        ({"messages": [user(""), ANSWER]}, "messages.0.content is empty"),
        ({"messages": [user(3), ANSWER]}, "messages.0.content is a number, expected text"),
        ({"messages": [user([{"type": "image"}]), ANSWER]}, "only parts of type 'text' are taken"),
        ({"messages": [user("x"), {"role": "assistant", "content": " "}]}, "messages.1.content is empty"),
        ({"messages": [user("x")]}, "the last message is the user's, so there is no answer to train on"),
        ({"messages": [ANSWER]}, "the first message is the assistant's"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "conversations.0.from is 'robot', expected human, gpt"),
        ({"conversations": [{"from": "human"}]}, "conversations.0.value is missing or null"),
    ],
)
def test_a_malformed_conversation_is_named_by_number_and_member(
    row: dict[str, Any], reason: str, tokenizer: Any, tmp_path: Path
) -> None:
    fine = {"messages": [user("x"), ANSWER]}
    e = failure(data_spec("ift", CHAT), tokenizer, upload(tmp_path, [fine, row, fine]))
    assert e.code == "invalid_data"
    assert [r["row"] for r in e.rows] == [2]
    assert reason in e.rows[0]["reason"]


def test_a_conversation_that_the_template_refuses_is_named(tokenizer: Any, tmp_path: Path) -> None:
    jinja = "{% if messages[0].role != 'user' %}{{ raise_exception('the user speaks first') }}{% endif %}x"
    row = {"messages": [{"role": "system", "content": "s"}, user("x"), ANSWER]}
    e = failure(data_spec("ift", {"chat_template": jinja}), tokenizer, upload(tmp_path, [row]))
    assert e.rows == [{"row": 1, "reason": "messages: the chat template refuses them: the user speaks first"}]


OPENAI = [{"role": "system", "content": "s"}, user("q1"), {"role": "assistant", "content": "a1"}, user("q2"), ANSWER]
SHAREGPT = [
    {"from": "system", "value": "s"},
    {"from": "human", "value": "q1"},
    {"from": "gpt", "value": "a1"},
    {"from": "user", "value": "q2"},
    {"from": "assistant", "value": "y"},
]


@pytest.mark.parametrize("responses_only", [False, True])
def test_sharegpt_and_openai_forms_give_the_same(responses_only: bool, tokenizer: Any, tmp_path: Path) -> None:
    columns = {"from": [m["from"] for m in SHAREGPT], "value": [m["value"] for m in SHAREGPT]}
    forms: list[dict[str, Any]] = [
        {"messages": OPENAI},
        {"conversations": SHAREGPT},
        {"messages": SHAREGPT},
        {"conversations": OPENAI},
        {"messages": json.dumps(OPENAI)},  # as a CSV file has to hold it
        {"conversations": columns},
        {"messages": [{**m, "tool_calls": None, "name": None} for m in OPENAI]},  # as a parquet file gives it
        {"messages": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in OPENAI]},
    ]
    spec = data_spec("ift", CHAT, size=512, responses_only=responses_only)
    prints = {prepare(spec, tokenizer, file=upload(tmp_path, [form])).fingerprint for form in forms}
    assert len(prints) == 1


def test_conversations_train_as_raw_text_in_cpt(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"messages": OPENAI}, {"messages": OPENAI[:2]}]  # no answer needed
    data = prepare(data_spec("cpt", CHAT, size=512), tokenizer, file=upload(tmp_path, rows))
    assert data.train["labels"][:] == data.train["input_ids"][:]
    assert [text.count(BOS) for text in texts(data, tokenizer)] == [1, 1]
    assert all(text.endswith(EOS) and not text.endswith(EOS + EOS) for text in texts(data, tokenizer))


def test_the_specs_system_message_is_trained_with(tokenizer: Any, tmp_path: Path) -> None:
    spec = data_spec("ift", CHAT | {"system": "Be brief."}, size=512)
    data = prepare(spec, tokenizer, file=upload(tmp_path, [{"messages": OPENAI[1:]}, {"messages": OPENAI}]))
    assert ["Be brief." in text for text in texts(data, tokenizer)] == [True, False]
    assert data.template.system == "Be brief."


def test_a_tokenizer_without_a_chat_template_still_takes_prompts(tmp_path: Path) -> None:
    tokenizer = sentencepiece_tokenizer()
    data = prepare(data_spec("cpt", {"prompt": "{text}"}), tokenizer, file=upload(tmp_path, [{"text": "return"}]))
    assert texts(data, tokenizer) == ["<s>return</s>"]


def test_a_tools_column_reaches_the_template(tokenizer: Any, tmp_path: Path) -> None:
    jinja = (
        "{{ tools | tojson if tools else 'none' }}|{% for m in messages %}{{ m.role }}:{{ m.content }}"
        "{{ m.tool_calls | tojson if m.tool_calls else '' }}|{% endfor %}"
    )
    tools = [{"type": "function", "function": {"name": "f"}}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    rows = [{"messages": [user("x"), call], "tools": value} for value in (tools, json.dumps(tools), None)]
    data = prepare(data_spec("cpt", {"chat_template": jinja}, size=512), tokenizer, file=upload(tmp_path, rows))
    rest = f'|user:x|assistant:[{{"id": "1"}}]|{EOS}'
    assert texts(data, tokenizer) == [f"{BOS}{json.dumps(tools)}{rest}"] * 2 + [f"{BOS}none{rest}"]
