"""What a run does when the ground gives way under it: no log, a full database, an answer that never came."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from service.db import Database
from service.ids import new_id
from service.jobs import repository
from service.jobs.repository import Fenced
from service.migrate import upgrade
from service.queue import JobQueue
from service.settings import Settings
from tests.conftest import new_database
from tests.recipes import cpt_spec
from tests.worker_kit import Host
from worker.progress import SqlProgress, persist
from worker.tasks import run_job


@pytest.fixture
def host(request: pytest.FixtureRequest, make_settings: Callable[..., Settings], tmp_path: Path) -> Iterator[Host]:
    url = new_database("sqlite", tmp_path, request)
    upgrade(url)
    settings = make_settings(database_url=url, max_attempts=2)
    db, queue = Database(url), JobQueue(settings.redis_url, settings.queue)
    yield Host(settings, db, queue, tmp_path / "worker.log")
    db.dispose()
    queue.redis.close()


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
