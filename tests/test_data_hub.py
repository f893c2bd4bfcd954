"""Sets by path: local folders through the datasets library, and a hub that says no."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.data_helpers import data_spec, failure, texts, upload
from tests.tiny import BOS, EOS, make_tiny_tokenizer
from worker.data import prepare

CPT = {"prompt": "{title}: {text}"}
ROWS = [{"title": f"t{i}", "text": f"text {i}", "other": [i]} for i in range(30)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as a hub set is laid out: a file a split."""
    path = tmp_path / "set"
    path.mkdir()
    upload(path, ROWS[:20], "train.jsonl")
    upload(path, ROWS[20:], "test.jsonl")
    return path


def expected(rows: list[dict[str, Any]]) -> list[str]:
    return [f"{BOS}{row['title']}: {row['text']}{EOS}" for row in rows]


def test_a_folder_gives_the_rows_of_its_split(tokenizer: Any, folder: Path) -> None:
    data = prepare(data_spec("cpt", CPT, path=str(folder)), tokenizer, file=None)
    assert texts(data, tokenizer) == expected(ROWS[:20])
    assert data.report["columns"] == ["title", "text", "other"]
    held = prepare(data_spec("cpt", CPT, path=str(folder), split="test[:50%]"), tokenizer, file=None)
    assert texts(held, tokenizer) == expected(ROWS[20:25])


@pytest.mark.parametrize("splits", [True, False])
def test_a_set_saved_to_disk_is_read(splits: bool, tokenizer: Any, tmp_path: Path) -> None:
    import datasets

    data = datasets.Dataset.from_list(ROWS)
    (datasets.DatasetDict({"train": data}) if splits else data).save_to_disk(tmp_path / "saved")
    read = prepare(data_spec("cpt", CPT, path=str(tmp_path / "saved")), tokenizer, file=None)
    assert texts(read, tokenizer) == expected(ROWS)
    e = failure(data_spec("cpt", CPT, path=str(tmp_path / "saved"), split="test"), tokenizer, None)
    assert e.code == "dataset_not_found"


def test_a_stream_gives_its_first_rows_and_a_seeded_split(tokenizer: Any, folder: Path) -> None:
    spec = data_spec("cpt", CPT, path=str(folder), streaming=True, max_samples=8)
    assert texts(prepare(spec, tokenizer, file=None), tokenizer) == expected(ROWS[:8])
    halves = data_spec("cpt", CPT, path=str(folder), streaming=True, max_samples=8, test_size=2)
    first, again = (prepare(halves, tokenizer, file=None) for _ in range(2))
    assert first.fingerprint == again.fingerprint
    assert (first.report["train_rows"], first.report["eval_rows"]) == (6, 2)
    more = data_spec("cpt", CPT, path=str(folder), streaming=True, max_samples=1000)
    assert prepare(more, tokenizer, file=None).report["rows"] == 20


def test_max_samples_chooses_by_seed_as_from_an_upload(tokenizer: Any, folder: Path) -> None:
    dataset: dict[str, Any] = {"max_samples": 7, "seed": 3, "test_size": 2}
    hub = prepare(data_spec("cpt", CPT, path=str(folder), **dataset), tokenizer, file=None)
    file = prepare(data_spec("cpt", CPT, **dataset), tokenizer, file=folder / "train.jsonl")
    assert hub.fingerprint == file.fingerprint
    assert hub.report["rows"] == 7


def test_a_malformed_row_is_named_by_its_place_in_the_split(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"title": "a", "text": None if i == 11 else "b"} for i in range(20)]
    (tmp_path / "set").mkdir()
    upload(tmp_path / "set", rows, "train.jsonl")
    e = failure(data_spec("cpt", CPT, path=str(tmp_path / "set")), tokenizer, None)
    assert (e.code, e.rows) == ("invalid_data", [{"row": 12, "reason": "column 'text' is null"}])
    e = failure(data_spec("cpt", CPT, path=str(tmp_path / "set"), streaming=True, max_samples=15), tokenizer, None)
    assert e.rows == [{"row": 12, "reason": "column 'text' is null"}]
    # A choice of rows is numbered by the set, not by the choice.
    e = failure(data_spec("cpt", CPT, path=str(tmp_path / "set"), max_samples=19), tokenizer, None)
    assert e.rows == [{"row": 12, "reason": "column 'text' is null"}]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_missing_column_is_named_with_those_there(streaming: bool, tokenizer: Any, folder: Path) -> None:
    spec = data_spec("cpt", {"prompt": "{nope} {text}"}, path=str(folder), streaming=streaming, max_samples=5)
    e = failure(spec, tokenizer, None)
    assert e.code == "invalid_data"
    assert "'nope'" in e.message
    assert e.message.endswith("other, text, title")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_file_of_the_set_that_does_not_parse_is_invalid_data(streaming: bool, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text('{"title": "a", "text": "b"}\n{"title":\n')
    e = failure(data_spec("cpt", CPT, path=str(tmp_path / "set"), streaming=streaming, max_samples=5), tokenizer, None)
    assert e.code == "invalid_data"
    assert "row 1" in e.message


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ({"split": "nope"}, "nope"),
        ({"split": "train[:x]"}, "train[:x]"),
        ({"name": "nope"}, "'nope' not found"),
        ({"split": "nope", "streaming": True, "max_samples": 3}, "nope"),
    ],
)
def test_an_unknown_split_or_configuration_is_named(
    dataset: dict[str, Any], message: str, tokenizer: Any, folder: Path
) -> None:
    e = failure(data_spec("cpt", CPT, path=str(folder), **dataset), tokenizer, None)
    assert e.code == "dataset_not_found"
    assert message in e.message
    assert not e.retry


def test_a_path_that_is_no_folder_is_not_looked_for_on_a_hub(tokenizer: Any, folder: Path, tmp_path: Path) -> None:
    assert "is no folder" in failure(data_spec("cpt", CPT, path=str(tmp_path / "nope")), tokenizer, None).message
    e = failure(data_spec("cpt", CPT, path=str(folder / "train.jsonl")), tokenizer, None)
    assert (e.code, "POST /v1/files" in e.message) == ("dataset_not_found", True)
    (tmp_path / "empty").mkdir()
    assert failure(data_spec("cpt", CPT, path=str(tmp_path / "empty")), tokenizer, None).code == "dataset_not_found"


def test_conversations_from_a_parquet_set_equal_those_from_lines(tokenizer: Any, tmp_path: Path) -> None:
    import datasets

    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    share = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    prints = set()
    for column, value in (("messages", chat), ("conversations", share)):
        folder = tmp_path / column
        folder.mkdir()
        datasets.Dataset.from_list([{column: value, "id": 1}] * 3).to_parquet(folder / "train.parquet")
        spec = data_spec("ift", {"chat_template": "default"}, path=str(folder), responses_only=True)
        prints.add(prepare(spec, tokenizer, file=None).fingerprint)
        prints.add(prepare(spec, tokenizer, file=upload(tmp_path, [{column: value}] * 3)).fingerprint)
    assert len(prints) == 1


# A hub over a real socket


class _Hub(BaseHTTPRequestHandler):
    """Answers every request for owner/<status> with that status."""

    def do_GET(self) -> None:
        name = self.path.split("/owner/")[-1].split("/")[0]
        status = int(name) if name.isdecimal() else 404
        self.send_response(status)
        if code := {404: "RepoNotFound", 401: "RepoNotFound", 403: "GatedRepo"}.get(status):
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


# In a process of its own: the hub client reads its variables at import, and waits between its attempts.
ASK_HUB = """
import json, sys, time
time.sleep = lambda seconds: None
from service.errors import JobFailure
from service.specs import DatasetSpec
from worker.data.hub import read_hub
out = {}
for name in sys.argv[1:]:
    for streaming in (False, True):
        spec = DatasetSpec(path=f"owner/{name}", template={"prompt": "{text}"}, streaming=streaming, max_samples=1)
        try:
            list(read_hub(spec, ["text"], "hf_secret" if name != "401" else None).rows)
        except JobFailure as e:
            out.setdefault(name, []).append([e.code, e.message, e.retry])
print(json.dumps(out))
"""


def ask_hub(names: list[str], tmp_path: Path, **env: str) -> dict[str, list[list[Any]]]:
    result = subprocess.run(
        [sys.executable, "-c", ASK_HUB, *names],
        env={**os.environ, "HF_HOME": str(tmp_path), **env},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    answer: dict[str, list[list[Any]]] = json.loads(result.stdout.splitlines()[-1])
    return answer


def test_a_hubs_refusal_says_what_it_is_and_whether_to_try_again(hub: str, tmp_path: Path) -> None:
    answers = ask_hub(["404", "403", "401", "500"], tmp_path, HF_ENDPOINT=hub)
    assert len(answers) == 4
    for status, both in answers.items():
        assert len(both) == 2
        for code, message, retry in both:
            assert (code, retry) == (("hub_error", True) if status == "500" else ("dataset_not_found", False)), message
            assert f"owner/{status}" in message
            assert "hf_secret" not in message
            assert str(Path.cwd()) not in message
    assert "gated" in answers["403"][0][1]
    assert "X-HF-Token" in answers["401"][0][1]


def test_without_a_network_a_hub_set_is_tried_again(tmp_path: Path) -> None:
    answers = ask_hub(["text"], tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert [(code, retry) for code, _, retry in answers["text"]] == [("hub_error", True)] * 2
    answers = ask_hub(["text"], tmp_path, HF_HUB_OFFLINE="1")
    assert [(code, retry) for code, _, retry in answers["text"]] == [("hub_error", True)] * 2


def test_reading_data_needs_neither_torch_nor_unsloth() -> None:
    code = "import sys, worker.data; print([m for m in ('torch', 'unsloth', 'transformers', 'datasets') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "[]", result.stderr
