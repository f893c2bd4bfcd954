"""What time lets go, and what it never does, on both databases."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from service import cli
from service.locks import exclusive
from service.models import AdapterRow, CheckpointRow, FileRow, JobRow
from service.retention import RESUME_FILES, needed, plan, prune, remove
from service.settings import Settings, get_settings
from tests.conftest import Api, serve
from tests.serving import until
from tests.steps import adapter, checkpoint, cpt, error_of, fail, ift, post, start, succeed, unique

ROOT = Path(__file__).resolve().parent.parent
DAY = 86_400.0


def keeping(api: Api, **days: float) -> Settings:
    """The API's settings with these policies; what is not named is kept for good."""
    forever = {
        f"keep_{n}_days": float("inf") for n in ("optimizer", "checkpoints", "failed", "uploads", "events", "logs")
    }
    return api.settings.model_copy(update={**forever, **{f"keep_{name}_days": value for name, value in days.items()}})


def upload(api: Api, age: float = 0.0) -> str:
    answer = api.http.post("/v1/files", files={"file": ("rows.jsonl", b'{"text": "a"}\n')})
    file_id: str = answer.json()["id"]
    with api.db.write() as session:
        session.execute(update(FileRow).where(FileRow.id == file_id).values(created_at=time.time() - age * DAY))
    return file_id


def ended(api: Api, job_id: str, age: float) -> None:
    """Let a job have ended this many days ago."""
    with api.db.write() as session:
        session.execute(update(JobRow).where(JobRow.id == job_id).values(finished_at=time.time() - age * DAY))


def whole_checkpoint(api: Api, job_id: str, step: int) -> Path:
    """As checkpoint(), with what only a resumed run reads."""
    path = checkpoint(api, job_id, step)
    for name in ("adapter_model.safetensors", *RESUME_FILES):
        (path / name).write_bytes(b"x" * 1000)
    return path


def refs(api: Api, settings: Settings) -> set[tuple[str, str]]:
    return {(item.kind, item.ref) for item in plan(api.db, settings)}


def file_of(api: Api, file_id: str) -> Path:
    return api.settings.files_dir / f"{file_id}.jsonl"


def test_an_upload_goes_once_nothing_has_used_it_for_long(api: Api) -> None:
    old, fresh, queued, evaluated, lately, long_ago = (upload(api, age) for age in (9, 0, 9, 9, 9, 9))
    post(api, cpt(unique(), dataset__path=..., dataset__file_id=queued))
    post(api, cpt(unique(), dataset__path=..., dataset__file_id=queued, dataset__eval_file_id=evaluated))
    for file_id, age in ((lately, 1), (long_ago, 8)):
        job = post(api, cpt(unique(), dataset__path=..., dataset__file_id=file_id))
        succeed(api, job["id"])
        ended(api, job["id"], age)
    settings = keeping(api, uploads=7)
    assert refs(api, settings) == {("upload", old), ("upload", long_ago)}
    report = prune(api.db, settings)
    assert report is not None
    assert report.bytes == 2 * len(b'{"text": "a"}\n')
    for file_id, stays in (
        (old, False),
        (long_ago, False),
        (fresh, True),
        (queued, True),
        (evaluated, True),
        (lately, True),
    ):
        assert file_of(api, file_id).exists() == stays
        assert api.http.get(f"/v1/files/{file_id}").status_code == (200 if stays else 404)


def test_optimizer_states_go_first_and_only_of_jobs_that_ended(api: Api) -> None:
    done, paused, live = (post(api, cpt(unique()))["id"] for _ in range(3))
    paths = {job: whole_checkpoint(api, job, 10) for job in (done, paused, live)}
    succeed(api, done)
    ended(api, done, 2)
    api.http.post(f"/v1/jobs/{paused}/pause")
    start(api, live)
    settings = keeping(api, optimizer=1)
    assert refs(api, settings) == {("optimizer state", f"{done}@10")}
    prune(api.db, settings)
    assert sorted(p.name for p in paths[done].iterdir()) == ["adapter_model.safetensors", "lorry_template.json"]
    for job in (paused, live):
        assert all((paths[job] / name).exists() for name in RESUME_FILES)
    listed = api.http.get(f"/v1/jobs/{done}/checkpoints").json()["data"]
    assert [c["bytes"] for c in listed] == [sum(p.stat().st_size for p in paths[done].iterdir())]
    assert refs(api, settings) == set()


def test_checkpoints_go_unless_something_relies_on_them(api: Api) -> None:
    jobs: dict[str, str] = {}
    for what in ("plain", "pinned", "named", "parent"):
        jobs[what] = post(api, cpt(unique(what)))["id"]
    jobs["failed"], jobs["start"] = (post(api, cpt(unique()))["id"] for _ in range(2))
    paths = {what: whole_checkpoint(api, job, 10) for what, job in jobs.items()}
    for what, job in jobs.items():
        succeed(api, job) if what not in ("failed", "start") else fail(api, job)
        ended(api, job, 40)
    name = {what: api.http.get(f"/v1/jobs/{job}").json()["adapter"] for what, job in jobs.items()}
    api.http.patch(f"/v1/adapters/{name['pinned']}", json={"pinned": True})
    post(api, ift(unique(), init={"adapter": f"{name['named']}@10"}))
    child = post(api, ift(unique(), init={"adapter": f"{name['parent']}@10"}))
    succeed(api, child["id"])
    waiting = post(api, ift(unique(), init={"adapter": f"{jobs['start']}@10"}))
    settings = keeping(api, checkpoints=30, failed=30)
    assert refs(api, settings) == {("checkpoint", f"{jobs['plain']}@10"), ("checkpoint", f"{jobs['failed']}@10")}
    with api.db.read() as session:
        row = session.get_one(CheckpointRow, (jobs["plain"], 10))
        assert needed(session, row, held={f"{name['plain']}@10"}), "the engine serves it"
        assert not needed(session, row, held={f"{name['plain']}@20", name["plain"]})
    prune(api.db, settings)
    assert {what for what, path in paths.items() if path.exists()} == {"pinned", "named", "parent", "start"}
    assert api.http.get(f"/v1/jobs/{jobs['plain']}/checkpoints").json()["data"] == []
    assert api.http.get(f"/v1/adapters/{name['plain']}").status_code == 200
    api.http.post(f"/v1/jobs/{waiting['id']}/cancel")
    assert refs(api, settings) == {("checkpoint", f"{jobs['start']}@10")}


def test_events_go_but_those_of_status_and_the_series_stay(api: Api) -> None:
    job = post(api, cpt(unique()))["id"]
    for step in (1, 2, 3):
        checkpoint(api, job, step)
    succeed(api, job)
    before = api.http.get(f"/v1/jobs/{job}/events", headers={"Accept": "application/json"}).json()["data"]
    ended(api, job, 31)
    live = post(api, cpt(unique()))["id"]
    checkpoint(api, live, 1)
    settings = keeping(api, events=30)
    found = refs(api, settings)
    assert ("events", job) in found
    assert ("events", live) not in found
    prune(api.db, settings)
    after = api.http.get(f"/v1/jobs/{job}/events", headers={"Accept": "application/json"}).json()["data"]
    assert after == [e for e in before if e["type"] == "status"]
    with api.http.stream("GET", f"/v1/jobs/{job}/events") as stream:  # it ends by itself, in spite of the gaps
        text = "".join(stream.iter_text())
    assert [int(line[4:]) for line in text.splitlines() if line.startswith("id: ")] == [e["id"] for e in after]
    assert refs(api, settings) == set()


def test_logs_and_refused_exports_of_jobs_that_ended_go(api: Api) -> None:
    done, live = (post(api, cpt(unique()))["id"] for _ in range(2))
    refused = {job: api.settings.exports_dir / f"{job}.rejected" for job in (done, live)}
    for job in (done, live):
        (api.settings.job_dir(job) / "tensorboard").mkdir(parents=True)
        (api.settings.job_dir(job) / "log.txt").write_text("line\n")
        (api.settings.job_dir(job) / "tensorboard" / "events").write_text("x")
        refused[job].mkdir(parents=True)
        (refused[job] / "model.safetensors").write_text("wrong")
    fail(api, done)
    ended(api, done, 100)
    settings = keeping(api, logs=90, failed=30)
    found = refs(api, settings)
    assert {("log", done), ("refused export", done)} <= found
    assert live not in {ref for _, ref in found}
    prune(api.db, settings)
    assert list(api.settings.job_dir(done).iterdir()) == []
    assert not refused[done].exists()
    assert (refused[live] / "model.safetensors").exists()
    assert api.http.get(f"/v1/jobs/{live}/log").text == "line\n"
    assert api.http.get(f"/v1/jobs/{done}/log").status_code == 200


def test_a_kill_between_row_and_files_leaves_nothing_that_dangles(api: Api) -> None:
    job = post(api, cpt(unique()))["id"]
    path = whole_checkpoint(api, job, 5)
    fail(api, job)
    ended(api, job, 2)
    code = (
        "import os, service.retention as r\n"
        "from service.db import Database\n"
        "from service.settings import Settings\n"
        "r._remove_files = lambda storage, item: os.kill(os.getpid(), 9)\n"
        "s = Settings()\n"
        "r.prune(Database(s.sqlalchemy_url), s)\n"
    )
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "LORRY_DATABASE_URL": api.settings.sqlalchemy_url,
        "LORRY_DATA_DIR": str(api.settings.data_dir),
        "LORRY_KEEP_FAILED_DAYS": "1",
        "LORRY_KEEP_OPTIMIZER_DAYS": "inf",
        "LORRY_KEEP_EVENTS_DAYS": "inf",
    }
    assert subprocess.run([sys.executable, "-c", code], env=env, timeout=120, check=False).returncode == -9
    assert path.exists()
    assert api.http.get(f"/v1/jobs/{job}/checkpoints").json()["data"] == []
    stray = file_of(api, "file-" + "0" * 24)
    stray.parent.mkdir(exist_ok=True)
    stray.write_bytes(b"lost its row")
    settings = keeping(api)
    assert refs(api, settings) == set(), "it may be on its way to a row"
    for lost in (path, stray):
        os.utime(lost, (time.time() - 2 * DAY,) * 2)
    assert refs(api, settings) == {("orphan", f"{job}/checkpoint-5"), ("orphan", stray.name)}
    prune(api.db, settings)
    assert not path.exists()
    assert not stray.exists()


@pytest.mark.parametrize("what", ["upload", "checkpoint"])
def test_a_job_made_at_the_same_moment_has_what_it_names_or_is_refused(api: Api, what: str) -> None:
    rounds = 12
    if what == "upload":
        names = [upload(api, 9) for _ in range(rounds)]
        specs = [cpt(unique(), dataset__path=..., dataset__file_id=name) for name in names]
    else:
        names = []
        for _ in range(rounds):
            names.append(post(api, cpt(unique()))["id"])
            whole_checkpoint(api, names[-1], 1)
            fail(api, names[-1])
            ended(api, names[-1], 9)
        specs = [ift(unique(), init={"adapter": f"{name}@1"}) for name in names]
    settings = keeping(api, uploads=7, failed=7)
    items = {item.ref.partition("@")[0]: item for item in plan(api.db, settings)}
    assert set(names) <= items.keys()
    barrier = threading.Barrier(2)

    def let_go(name: str) -> bool:
        barrier.wait(60)
        return remove(api.db, settings, items[name])

    with ThreadPoolExecutor(1) as pool:
        for name, spec in zip(names, specs, strict=True):
            gone = pool.submit(let_go, name)
            barrier.wait(60)
            answer = api.http.post("/v1/jobs", json=spec)
            path = settings.data_dir / items[name].paths[0]
            if gone.result(60):
                assert answer.status_code == 404, answer.text
                assert error_of(answer)["code"] == ("file_not_found" if what == "upload" else "adapter_not_found")
                assert not path.exists()
            else:
                assert answer.status_code == 202, answer.text
                assert path.exists()


def test_a_file_that_cannot_be_removed_keeps_none_of_those_behind_it(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [str(post(api, cpt(unique()))["id"]) for _ in range(2)]
    for job in jobs:
        whole_checkpoint(api, job, 10)
        succeed(api, job)
        ended(api, job, 3)
    first, second = (
        api.settings.job_dir(job) / "checkpoints" / "checkpoint-10" / RESUME_FILES[0] for job in sorted(jobs)
    )
    unlink = Path.unlink

    def refused(path: Path, missing_ok: bool = False) -> None:
        if path == first:
            raise PermissionError(13, "Permission denied")
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", refused)
    report = prune(api.db, keeping(api, optimizer=2))
    assert report is not None
    assert f"{sorted(jobs)[0]}@10" in {item.ref for item in report.kept}
    assert first.exists()
    assert not second.exists()


def test_one_process_prunes_at_a_time(api: Api) -> None:
    with exclusive(api.settings.sqlalchemy_url, "prune", wait=False) as first:
        assert first
        assert prune(api.db, api.settings) is None
    assert prune(api.db, api.settings) is not None


def test_an_api_process_prunes_by_itself(sqlite_url: str, make_settings: Callable[..., Settings]) -> None:
    with serve(make_settings(database_url=sqlite_url, prune_seconds=0.2, keep_uploads_days=7)) as served:
        file_id = upload(served, 9)
        until(lambda: not file_of(served, file_id).exists(), 60)
        assert served.http.get(f"/v1/files/{file_id}").status_code == 404


@pytest.fixture
def command(api: Api, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The `lorry` command on the API's database and data folder."""
    for name in ("data_dir", "database_url", "engine_url", "redis_url"):
        monkeypatch.setenv(f"LORRY_{name.upper()}", str(getattr(api.settings, name)))
    monkeypatch.setenv("LORRY_KEEP_UPLOADS_DAYS", "7")
    get_settings.cache_clear()
    yield
    get_settings.cache_clear()


@pytest.mark.usefixtures("command")
def test_a_dry_run_says_what_would_go_and_removes_nothing(api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    file_id = upload(api, 9)
    cli.main(["prune", "--dry-run"])
    said = capsys.readouterr().out
    assert "unused for over LORRY_KEEP_UPLOADS_DAYS" in said
    assert "nothing was removed" in said
    assert file_of(api, file_id).exists()
    cli.main(["prune", "--json"])
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert {"kind": "upload", "ref": file_id, "bytes": 14} in told["items"]
    assert not file_of(api, file_id).exists()


def test_an_adapter_and_its_accepted_export_are_never_touched(api: Api) -> None:
    name = unique()
    job = adapter(api, name)
    export = post(api, {"kind": "export", "adapter": name, "format": "lora"})["id"]
    succeed(api, export, artifacts={"manifest.json": b"{}"})
    for one in (job, export):
        ended(api, one, 1000)
    everything = keeping(api, optimizer=0, checkpoints=0, failed=0, uploads=0, events=0, logs=0)
    prune(api.db, everything)
    with api.db.read() as session:
        path = Path(str(session.get_one(AdapterRow, name).path))
    assert (path / "lorry_template.json").exists()
    assert api.http.get(f"/v1/jobs/{export}/artifacts/manifest.json").content == b"{}"
