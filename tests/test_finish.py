"""How a run's outcome is stored, on both databases: with a push that failed as the last step, and by a run too late."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from service.db import Database
from service.errors import JobFailure
from service.ids import new_id
from service.jobs import repository
from service.jobs import service as jobs
from service.jobs.repository import Fenced
from service.models import AdapterRow, JobRow, RunRow
from service.queue import JobQueue
from service.settings import Settings
from service.specs import parse_spec
from tests.steps import cpt, unique
from worker import tasks
from worker.outcome import Outcome


@pytest.fixture
def db(settings: Settings) -> Iterator[Database]:
    database = Database(settings.sqlalchemy_url)
    yield database
    database.dispose()


def begun(db: Database, settings: Settings, spec: dict[str, object]) -> tuple[JobRow, str]:
    """A running job and its run's id."""
    row, _ = jobs.create(
        db, JobQueue(settings.redis_url, settings.queue), settings, parse_spec(spec), key=None, token=None
    )
    run_id = new_id("run")
    with db.write() as session:
        claimed = repository.claim(session, row.id, run_id, "here")
        assert claimed is not None
        assert repository.transition(session, row.id, ["preparing"], "running", run_id=run_id)
    return claimed, run_id


ADAPTER = {"path": "/adapters/x", "step": 3, "bytes": 10, "config": {"r": 8}}
ARTIFACT = {"path": "manifest.json", "bytes": 2, "sha256": "0" * 64}


def test_what_was_made_is_kept_when_only_its_push_failed(db: Database, settings: Settings) -> None:
    training, run_1 = begun(db, settings, cpt(name := unique()))
    failure = JobFailure("hub_push_failed", "the hub said no to hf_0123456789abcdef")
    outcome = Outcome("done", result={"eval_loss": float("nan")}, adapter=ADAPTER, failure=failure)
    tasks.finish(db, settings, training, run_1, outcome)
    export, run_2 = begun(db, settings, {"kind": "export", "adapter": name})
    tasks.finish(db, settings, export, run_2, Outcome("done", artifacts=[ARTIFACT], failure=failure))
    with db.read() as session:
        adapter = session.get_one(AdapterRow, name)
        assert (adapter.ready, adapter.path, adapter.step) == (True, "/adapters/x", 3)
        assert [a.path for a in repository.artifacts(session, export.id)] == ["manifest.json"]
        for job_id, run_id in ((training.id, run_1), (export.id, run_2)):
            row, run = session.get_one(JobRow, job_id), session.get_one(RunRow, run_id)
            assert (row.status, run.outcome) == ("failed", "failed")
            assert row.error is not None
            assert (row.error["code"], row.error["message"]) == ("hub_push_failed", "the hub said no to ***")
            assert "log_tail" in run.record
        assert session.get_one(JobRow, training.id).result == {"eval_loss": None}


@pytest.mark.parametrize("failure", [None, JobFailure("hub_push_failed", "no")], ids=["good", "push failed"])
def test_a_run_that_lost_its_job_stores_nothing(db: Database, settings: Settings, failure: JobFailure | None) -> None:
    training, run_id = begun(db, settings, cpt(name := unique()))
    with db.write() as session:
        assert repository.end_run(session, training.id, run_id, "queued", reason="taken for dead", attempt=2)
    with pytest.raises(Fenced):
        tasks.finish(db, settings, training, run_id, Outcome("done", adapter=ADAPTER, failure=failure))
    with db.read() as session:
        assert not session.get_one(AdapterRow, name).ready
        assert session.get_one(JobRow, training.id).status == "queued"
