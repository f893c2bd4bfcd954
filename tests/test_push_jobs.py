"""Jobs with push_to_hub, as a worker runs them: what is pushed, what is kept when it is not, and where the token is not."""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.utils import _http

from service.adapters import service as adapters
from service.db import Database
from service.jobs import repository
from service.jobs import service as jobs
from service.migrate import upgrade
from service.models import AdapterRow, JobRow
from service.queue import JobQueue
from service.reconcile import Report, compare_disk
from service.settings import Settings
from service.specs import parse_spec
from service.storage import open_storage
from tests.conftest import new_database
from tests.hub_server import Hub, User, serve_hub
from tests.recipes import TRAINING, cpt_spec, texts
from tests.worker_kit import Host
from worker import hub as pushing
from worker import tasks
from worker.progress import POLL_SECONDS

TOKEN, FOREIGN = "hf_OnlyAdaHasThisOne0123456789", "hf_NobodyGaveThisOneOut"

EXPORT = {"kind": "export", "adapter": "pushed", "verify": False}


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with serve_hub() as server:
        server.users[TOKEN] = User("ada")
        yield server


@pytest.fixture(scope="module")
def host(
    request: pytest.FixtureRequest,
    make_settings: Callable[..., Settings],
    tmp_path_factory: pytest.TempPathFactory,
    hub: Hub,
) -> Iterator[Host]:
    """A host whose worker is this process: run() does what the child of a real one does."""
    folder = tmp_path_factory.mktemp("host")
    url = new_database("sqlite", folder, request)
    upgrade(url)
    settings = make_settings(database_url=url)
    db, queue = Database(url), JobQueue(settings.redis_url, settings.queue)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("data_dir", "database_url", "redis_url", "queue"):
            patch.setenv(f"LORRY_{name.upper()}", str(getattr(settings, name)))
        patch.setenv("HF_ENDPOINT", hub.url)
        patch.delenv("HF_TOKEN", raising=False)
        patch.setattr(pushing, "WAITS", (0.01, 0.01))
        patch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None, time=time.time))
        patch.setattr(_http.constants, "HF_HUB_DISABLE_TELEMETRY", True)
        yield Host(settings, db, queue, folder / "worker.log")
    ctypes.CDLL(None).prctl(1, 0)  # a job's process is told of its parent's death; this one is not to be
    db.dispose()
    queue.redis.close()


def run(host: Host, spec: dict[str, Any], token: str | None = TOKEN) -> JobRow:
    """Make a job, as a POST with X-HF-Token does, and run it; a token must be nowhere once it has ended."""
    made, _ = jobs.create(host.db, host.queue, host.settings, parse_spec(spec), key=None, token=token)
    tasks.run_job(made.id)
    assert host.queue.token(made.id) is None
    for secret in (TOKEN, FOREIGN):
        with host.db.engine.connect() as connection:
            dump = "\n".join(connection.connection.driver_connection.iterdump())  # type: ignore[union-attr]
        assert made.id in dump
        assert secret not in dump, "in the database"
        for path in host.settings.data_dir.rglob("*"):
            assert not path.is_file() or secret.encode() not in path.read_bytes(), path
    return host.job(made.id)


@pytest.fixture(scope="module")
def spec(host: Host, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    file_id = host.upload(texts(tmp_path_factory.mktemp("rows") / "rows.jsonl"))

    def make(adapter: str, repo: str, **hub: Any) -> dict[str, Any]:
        training = {**TRAINING, "max_steps": 1, "eval_steps": 1, "save_steps": 1}
        push = {"repo_id": repo, **hub}
        return cpt_spec(tiny_base, adapter=adapter, dataset={"file_id": file_id}, training=training, push_to_hub=push)

    return make


@pytest.fixture(scope="module")
def trained(host: Host, spec: Callable[..., dict[str, Any]]) -> JobRow:
    """A finished training that pushed its adapter."""
    row = run(host, spec("pushed", "ada/pushed"))
    assert row.status == "succeeded", row.error
    return row


def logits(base: Path, adapter: Path) -> torch.Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()
    with torch.no_grad():
        out: torch.Tensor = model(torch.arange(5, 25)[None]).logits
    return out


def test_a_training_pushes_the_adapter_that_peft_loads_from_the_hub(
    host: Host, hub: Hub, trained: JobRow, tiny_base: Path, tmp_path: Path
) -> None:
    repo = hub.repos["ada/pushed"]
    result = trained.result["push"]
    assert (result["url"], result["commit"]) == (f"{hub.url}/ada/pushed", repo.branches["main"])
    assert repo.private
    with host.db.read() as session:
        path = Path(adapters.resolve(session, open_storage(host.settings), "pushed").path)
    assert set(repo.files) >= {"README.md", "manifest.json", "adapter_model.safetensors", "tokenizer.json"}
    assert not set(repo.files) & {"lorry_probe.json", "optimizer.pt"}
    assert b"# pushed\n" in repo.files["README.md"]
    local = Path(snapshot_download("ada/pushed", endpoint=hub.url, token=TOKEN, cache_dir=tmp_path / "cache"))
    assert torch.equal(logits(tiny_base, local), logits(tiny_base, path))
    assert not (host.settings.job_dir(trained.id) / "push").exists()
    phases = [e.data.get("phase") for e in host.events(trained.id, "progress")]
    assert phases[0] == "starting"
    assert phases[-1] == "pushed"
    assert trained.progress["push"]["bytes"] == trained.progress["push"]["total_bytes"] == result["bytes"]


def test_an_export_pushes_its_artifacts(host: Host, hub: Hub, trained: JobRow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)  # the worker's own
    push = {"repo_id": "ada/merged", "private": False, "revision": "half"}
    row = run(host, {"kind": "export", "adapter": "pushed", "format": "merged_16bit", "push_to_hub": push}, token=None)
    assert row.status == "succeeded", row.error
    folder = host.settings.exports_dir / row.id
    with host.db.read() as session:
        listed = [a.path for a in repository.artifacts(session, row.id)]
    repo = hub.repos["ada/merged"]
    assert not repo.private
    tree = repo.commits[repo.branches["half"]]
    assert {p: (folder / p).read_bytes() for p in listed}.items() <= {p: e.content for p, e in tree.items()}.items()
    assert set(tree) - set(listed) == {".gitattributes"}
    assert row.result["push"]["files"] == len(listed)


def test_a_training_whose_push_fails_keeps_its_adapter_and_says_how_to_push_it(
    host: Host, hub: Hub, spec: Callable[..., dict[str, Any]]
) -> None:
    hub.fail("POST .*/ada/later/commit/", times=1000, status=500, body={"error": f"no luck, {TOKEN}"})
    row = run(host, spec("kept", "ada/later"))
    hub.failures.clear()
    assert (row.status, row.error["code"]) == ("failed", "hub_push_failed")  # type: ignore[index]
    assert row.result["verification"]
    with host.db.read() as session:
        adapter = session.get_one(AdapterRow, "kept")
        assert adapter.ready
        assert Path(adapters.resolve(session, open_storage(host.settings), "kept").path).is_dir()
    assert host.runs(row.id)[0].record["log_tail"]
    message = row.error["message"]  # type: ignore[index]
    again = re.search(r"POST /v1/jobs (\{.*\}) pushes it again", message)
    assert again, message
    assert run(host, json.loads(again[1])).status == "succeeded"
    assert "adapter_model.safetensors" in hub.repos["ada/later"].files


def test_an_export_whose_push_fails_keeps_its_files(host: Host, hub: Hub, trained: JobRow) -> None:
    hub.fail("POST .*/commit/", times=1000, status=500)
    row = run(host, {**EXPORT, "push_to_hub": {"repo_id": "ada/export"}})
    hub.failures.clear()
    assert (row.status, row.error["code"]) == ("failed", "hub_push_failed")  # type: ignore[index]
    compare_disk(host.db, host.settings, Report())  # what failed jobs left goes, but not this
    with host.db.read() as session:
        listed = {a.path for a in repository.artifacts(session, row.id)}
    assert all((host.settings.exports_dir / row.id / path).is_file() for path in listed)
    assert {"adapter_model.safetensors", "manifest.json"} <= listed
    assert f"/v1/jobs/{row.id}/artifacts" in row.error["message"]  # type: ignore[index]


def test_a_push_that_its_worker_left_goes_on_at_the_next_run(host: Host, hub: Hub, trained: JobRow) -> None:
    hub.blobs.clear()
    hub.sent.clear()
    hub.when("POST /lfs/[^/]+/verify", lambda: os.kill(os.getpid(), signal.SIGUSR1))  # the worker is told to stop
    spec = parse_spec({**EXPORT, "push_to_hub": {"repo_id": "ada/resumed"}})
    made, _ = jobs.create(host.db, host.queue, host.settings, spec, key=None, token=TOKEN)
    tasks.run_job(made.id)
    assert host.job(made.id).status == "queued"
    assert hub.repos["ada/resumed"].files == {}
    tasks.run_job(made.id)
    assert host.job(made.id).status == "succeeded"
    assert "adapter_model.safetensors" in hub.repos["ada/resumed"].files
    assert list(hub.sent.values()) == [1], "the blob had arrived in the first run"


def test_a_cancel_while_it_is_pushed_leaves_nothing(host: Host, hub: Hub, trained: JobRow) -> None:
    def cancel() -> None:
        with host.db.read() as session:
            found, _ = repository.list_page(session, kind="export", status="running", limit=1, after=None)
        jobs.cancel(host.db, host.queue, found[0].id)
        time.sleep(4 * POLL_SECONDS)  # the run asks at most so often; this request is longer

    hub.when("POST .*/ada/no/preupload/", cancel)
    row = run(host, {**EXPORT, "push_to_hub": {"repo_id": "ada/no"}})
    assert row.status == "cancelled"
    assert hub.repos["ada/no"].files == {}
    assert not (host.settings.exports_dir / row.id).exists()
    with host.db.read() as session:
        assert not repository.artifacts(session, row.id)


@pytest.mark.parametrize(
    ("token", "repo", "code"),
    [
        (None, "ada/x", "hub_token_missing"),
        (FOREIGN, "ada/x", "hub_token_refused"),
        (TOKEN, "bob/x", "hub_forbidden"),
    ],
)
def test_who_may_not_push_is_told_before_the_work(
    host: Host, spec: Callable[..., dict[str, Any]], token: str | None, repo: str, code: str
) -> None:
    row = run(host, spec("never", repo), token)
    assert (row.status, row.error["code"]) == ("failed", code)  # type: ignore[index]
    assert [e.data.get("phase") for e in host.events(row.id, "progress")] == ["starting"], "before data and model"
    with host.db.read() as session:
        assert session.get(AdapterRow, "never") is None
