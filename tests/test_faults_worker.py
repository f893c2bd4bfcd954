"""What a run does when the ground gives way under it: no log, a full database, an answer that never came."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from service.ids import new_id
from service.jobs import repository
from service.jobs.repository import Fenced
from service.settings import Settings
from tests.conftest import new_database
from tests.recipes import cpt_spec
from tests.worker_kit import ROOT, Host, child_of, gone, host_on
from worker.progress import SqlProgress, persist
from worker.tasks import run_job


@pytest.fixture
def host(request: pytest.FixtureRequest, make_settings: Callable[..., Settings], tmp_path: Path) -> Iterator[Host]:
    url = new_database("sqlite", tmp_path, request)
    with host_on(make_settings(database_url=url, max_attempts=2), tmp_path / "worker.log") as made:
        yield made


def submit(host: Host) -> str:
    return host.submit(cpt_spec(Path("org/model"), adapter="a", dataset={"file_id": None, "path": "org/set"}))


def test_a_run_that_can_have_no_log_is_a_failure_with_its_reason(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("data_dir", "database_url", "redis_url", "queue", "max_attempts"):
        monkeypatch.setenv(f"LORRY_{name.upper()}", str(getattr(host.settings, name)))
    (host.settings.data_dir / "jobs").write_text("a file where the folder should be")
    job = submit(host)
    run_job(job)
    row = host.job(job)
    assert (row.status, row.attempt) == ("queued", 2)
    run_job(job)
    row = host.job(job)
    assert row.status == "failed"
    assert row.error is not None
    assert "Error: " in row.error["message"]
    assert "attempt 2 of 2" in row.error["message"]


def test_a_signal_to_a_child_that_has_just_been_forked_is_not_lost(host: Host) -> None:
    """Sent at the first line that the child runs, when it still has its parent's handlers."""
    script = """
import os, signal
from service.settings import Settings
from worker.run import LorryWorker

parent, real = os.getpid(), os.setpgrp
def setpgrp():
    real()
    if os.getpid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)

os.setpgrp = setpgrp
worker = LorryWorker(Settings())
worker.work(burst=True, with_scheduler=False)
print("ended by", os.WTERMSIG(worker.horse_status), worker.told_to_stop)
"""
    names = ("data_dir", "database_url", "redis_url", "queue", "max_attempts")
    env = {**os.environ, **{f"LORRY_{n.upper()}": str(getattr(host.settings, n)) for n in names}}
    submit(host)
    command = [sys.executable, "-c", script]
    env["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=True)
    assert "ended by 15 False" in done.stdout, done.stdout + done.stderr


def test_a_child_that_hangs_without_its_job_is_killed_and_its_worker_goes_on(
    host: Host, tiny_base: Path, tmp_path: Path
) -> None:
    host.settings.heartbeat_timeout_seconds, host.settings.heartbeat_seconds = 6.0, 0.5
    (tmp_path / "bad.jsonl").write_text('{"text": 1}\n')  # found out at once
    job = host.submit(cpt_spec(tiny_base, dataset={"file_id": host.upload(tmp_path / "bad.jsonl")}))
    # The first child stops before it has a process group of its own, in which it could be killed with what it started.
    script = f"""
import os, pathlib, signal
from worker import run

parent, real, once = os.getpid(), os.setpgrp, pathlib.Path({str(tmp_path / "once")!r})
def setpgrp():
    if os.getpid() != parent and not once.exists():
        once.touch()
        os.kill(os.getpid(), signal.SIGSTOP)
    real()

os.setpgrp = setpgrp
run.STRAY_TIMEOUTS = 1
run.main()
"""
    with host.worker("-c", script) as process:
        child = child_of(process)
        assert gone(child, 200), host.log.read_text()
        row = host.status(job, "failed")
        assert process.poll() is None, "its worker was killed with it"
    assert "hangs without its job" in host.log.read_text()
    assert row.error is not None
    assert row.error["code"] == "invalid_data", "the same worker took the job again"


def test_a_full_database_is_waited_for(host: Host) -> None:
    tries: list[int] = []

    def action(session: Session) -> Any:
        tries.append(1)
        limit = 1 if len(tries) == 1 else 1_000_000  # SQLite's own limit: the same error as that of a full disk
        session.execute(text(f"PRAGMA max_page_count={limit}"))
        session.execute(text("CREATE TABLE more AS SELECT zeroblob(100000)"))

    persist(host.db, action)
    assert len(tries) == 2


def test_a_commit_whose_answer_was_lost_may_be_done_again(host: Host) -> None:
    job, run = submit(host), new_id("run")
    with host.db.write() as session:
        assert repository.claim(session, job, run, "a worker") is not None
    progress = SqlProgress(host.db, host.settings, job, run)
    progress.started()
    progress.started()
    assert [e.data["status"] for e in host.events(job, "status")] == ["queued", "preparing", "running"]
    with pytest.raises(Fenced):
        SqlProgress(host.db, host.settings, job, "run_other").started()
