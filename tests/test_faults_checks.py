"""The fault suite's checks find what they are there to find: each is shown a site with one thing wrong."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.faults import checks, parts
from benchmarks.faults.load import Ledger, Sent
from benchmarks.faults.parts import Site
from benchmarks.faults.watch import Watcher
from service.db import Database
from service.ids import new_id
from service.jobs import repository
from service.jobs import service as jobs
from service.migrate import upgrade
from service.models import AdapterRow, ArtifactRow, JobRow, RunRow
from service.queue import JobQueue
from service.specs import parse_spec
from tests.recipes import cpt_spec


@dataclass
class Scene:
    """A site in SQL and on disk alone: a training and an export, both done and right."""

    site: Site
    db: Database
    ledger: Ledger
    reference: dict[str, dict[str, object]]

    def found(self) -> dict[str, list[str]]:
        found = checks.run_all(self.db, self.site, self.ledger, self.reference, [])
        return {check: wrong for check, wrong in found.items() if wrong}


@pytest.fixture
def scene(tmp_path: Path, redis_url: str) -> Iterator[Scene]:
    (tmp_path / "database").mkdir()
    url = f"sqlite:///{tmp_path / 'database' / 'lorry.db'}"
    upgrade(url)
    site = Site(tmp_path, "sqlite", "tag", False, None, database_url=url, redis_url=redis_url)
    db, queue, ledger = Database(url), JobQueue(redis_url, f"q-{new_id('q')}"), Ledger()
    base = cpt_spec(Path("org/model"), adapter="a", dataset={"file_id": None, "path": "org/set"})
    for role, spec in (("cpt", base), ("export-lora", {"kind": "export", "adapter": "a", "format": "lora"})):
        row, _ = jobs.create(db, queue, site.settings, parse_spec(spec), key=f"key-{role}", token=None)
        run = new_id("run")
        where = site.data / "adapters" / f"{row.id}.x" if role == "cpt" else site.data / "exports" / row.id
        where.mkdir(parents=True)
        (where / "adapter_model.safetensors").write_bytes(b"weights")
        with db.write() as session:
            assert repository.claim(session, row.id, run, "worker")
            repository.transition(session, row.id, ["preparing"], "running", run_id=run)
            for step in (1, 2, 3):
                repository.put_metrics(session, row.id, [("train", step, {"loss": 1 / step})])
                repository.add_event(session, row.id, "metrics", {"split": "train", "step": step, "loss": 1 / step})
            repository.end_run(session, row.id, run, "succeeded")
            if role == "cpt":
                adapter = session.get_one(AdapterRow, "a")
                adapter.ready, adapter.path = True, str(where)
            else:
                digest = hashlib.sha256(b"weights").hexdigest()
                path = "adapter_model.safetensors"
                session.add(ArtifactRow(job_id=row.id, path=path, bytes=7, sha256=digest))
        ledger.sent.append(Sent(f"key-{role}", role, row.id))
    reference = {s.role: checks.outcome(db, site, s.job_id or "") for s in ledger.sent}
    yield Scene(site, db, ledger, reference)
    db.dispose()
    queue.redis.close()


def lose_a_job(s: Scene) -> str:
    s.ledger.sent.append(Sent("key-lost", "cpt", new_id("job")))
    return "no job lost"


def leave_one_running(s: Scene) -> str:
    with s.db.write() as session:
        session.get_one(JobRow, s.ledger.sent[0].job_id).status = "running"
    return "no job lost"


def fail_one_for_no_good_reason(s: Scene) -> str:
    with s.db.write() as session:
        row = session.get_one(JobRow, s.ledger.sent[1].job_id)
        row.status, row.error = "failed", {"code": "worker_lost", "message": "attempt 3 of 3", "rows": []}
    return "no job lost"


def succeed_twice(s: Scene) -> str:
    job = s.ledger.sent[0].job_id or ""
    with s.db.write() as session:
        repository.add_event(session, job, "status", {"status": "succeeded", "attempt": 1})
        session.add(RunRow(id="run_2", job_id=job, attempt=2, worker="w", outcome="succeeded", started_at=1.0))
    return "none completed twice"


def damage_an_artifact(s: Scene) -> str:
    (s.site.data / "exports" / (s.ledger.sent[1].job_id or "") / "adapter_model.safetensors").write_bytes(b"other")
    return "none completed twice"


def write_after_the_end(s: Scene) -> str:
    with s.db.write() as session:
        repository.add_event(session, s.ledger.sent[0].job_id or "", "metrics", {"split": "train", "step": 4})
    return "fenced runs write nothing"


def train_otherwise(s: Scene) -> str:
    with s.db.write() as session:
        repository.put_metrics(session, s.ledger.sent[0].job_id or "", [("train", 2, {"loss": 0.5000001})])
    return "as the undisturbed training"


def skip_a_point(s: Scene) -> str:
    with s.db.write() as session:
        repository.drop_metrics_after(session, s.ledger.sent[0].job_id or "", 2)
    return "as the undisturbed training"


def leave_a_file(s: Scene) -> str:
    (s.site.data / "jobs").mkdir()
    (s.site.data / "jobs" / ".x.12.tmp").write_text("")
    return "nothing left on disk"


def leave_a_folder(s: Scene) -> str:
    (s.site.data / "adapters" / "job_x.12345678").mkdir()
    return "nothing left on disk"


def break_a_promise(s: Scene) -> str:
    s.ledger.violation("POST answered 500")
    return "every client answered"


@pytest.mark.parametrize(
    "wrong",
    [
        lose_a_job,
        leave_one_running,
        fail_one_for_no_good_reason,
        succeed_twice,
        damage_an_artifact,
        write_after_the_end,
        train_otherwise,
        skip_a_point,
        leave_a_file,
        leave_a_folder,
        break_a_promise,
    ],
)
def test_each_check_finds_what_it_is_for(scene: Scene, wrong: Callable[[Scene], str]) -> None:
    assert scene.found() == {}
    check = wrong(scene)
    assert check in scene.found()


def test_two_processes_that_train_one_job_are_seen(tmp_path: Path, redis_url: str) -> None:
    """The watcher goes by open files and processor time: two processes that hold a job's files and work are enough."""
    job = new_id("job")
    run = tmp_path / "data" / "jobs" / job
    (run / "tensorboard").mkdir(parents=True)
    code = f"""
import time
log, events = open({str(run / "log.txt")!r}, "a"), open({str(run / "tensorboard" / "events")!r}, "a")
end = time.process_time() + 6
while time.process_time() < end: pass
"""
    site = Site(tmp_path, "sqlite", "tag", False, None)
    watcher = Watcher(site)
    parent = f"""
import subprocess, sys, time
for _ in range(2):
    subprocess.Popen([sys.executable, "-c", {code!r}])
    time.sleep(0.5)
time.sleep(600)
"""
    (tmp_path / "logs").mkdir()
    part = parts.Part("worker-1", [sys.executable, "-c", parent], dict(os.environ), tmp_path / "logs" / "w", tmp_path)
    site.parts["worker-1"] = part
    part.start()
    try:
        deadline = time.monotonic() + 120
        while not watcher.overlaps:
            watcher.sample()
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        assert part.process is not None
        os.killpg(part.process.pid, signal.SIGKILL)
        part.process.wait()
    assert watcher.overlaps[0].startswith(job)
