"""What SQL says against what the queue and the heartbeats say. Run at start and every few seconds, by the API and by
each worker; every step is a compare-and-set, so any number of processes may run it at once.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field

from redis.exceptions import RedisError

from service.db import Database
from service.jobs import repository
from service.queue import JobQueue
from service.settings import Settings

log = logging.getLogger("lorry.reconcile")


@dataclass
class Report:
    """What one pass did, by job id."""

    requeued: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    enqueued: list[str] = field(default_factory=list)


def reconcile(db: Database, queue: JobQueue, settings: Settings) -> Report:
    """Lost runs go back to the queue; children of failed jobs fail; queued jobs that the queue lacks are put there."""
    report = Report()
    with db.read() as session:
        lost = [(r.id, r.run_id) for r in repository.stale(session, time.time() - settings.heartbeat_timeout_seconds)]
    for job_id, run_id in lost:
        reason = f"no heartbeat for {settings.heartbeat_timeout_seconds:g} s: its worker or host was lost"
        give_back(db, queue, settings, job_id, run_id, code="worker_lost", reason=reason, report=report)
    fail_orphans(db, queue, report)
    try:
        with db.read() as session:
            ready = repository.ready_to_run(session)
        missing = set(ready) - queue.waiting() if ready else set()
        for job_id in (j for j in ready if j in missing):
            queue.enqueue(job_id)
            report.enqueued.append(job_id)
    except RedisError as error:
        log.warning("queue out of reach, will try again: %s", error)
    return report


def give_back(
    db: Database, queue: JobQueue, settings: Settings, job_id: str, run_id: str | None, *, code: str, reason: str,
    report: Report | None = None,
) -> None:  # fmt: skip
    """End a run that died: back to the queue with attempt + 1, or as it was asked to end, or failed for good."""
    with db.write() as session:
        row = repository.get(session, job_id)
        if row is None or row.run_id != run_id or run_id is None:
            return
        expect = [row.status]
        error = {"code": code, "message": reason, "rows": []}
        if row.control == "cancel":
            repository.transition(session, job_id, expect, "cancelled", run_id=run_id, reason=reason)
        elif row.control == "pause":
            repository.transition(session, job_id, expect, "paused", run_id=run_id, reason=reason)
        elif row.attempt >= settings.max_attempts:
            error["message"] = f"attempt {row.attempt} of {settings.max_attempts}: {reason}"
            repository.transition(session, job_id, expect, "failed", run_id=run_id, reason=reason, error=error)
            if report:
                report.failed.append(job_id)
        else:
            repository.transition(
                session, job_id, expect, "queued", run_id=run_id, reason=reason, attempt=row.attempt + 1
            )
            if report:
                report.requeued.append(job_id)
    after_end(db, queue, job_id)


def fail_orphans(db: Database, queue: JobQueue, report: Report | None = None) -> None:
    """Fail jobs whose parent failed or was cancelled, and theirs in turn."""
    while True:
        with db.read() as session:
            orphans = repository.orphaned(session)
        moved = False
        for job_id, parent, cause in orphans:
            cause = cause or {}
            reason = f"parent job {parent} did not succeed: {cause.get('message')}"
            error = {"code": "parent_failed", "message": reason, "rows": [], "parent": parent, "cause": cause}
            with db.write() as session:
                moved |= repository.transition(
                    session, job_id, ["queued", "paused"], "failed", reason=reason, error=error
                )
            queue.remove(job_id)
            queue.forget_token(job_id)
            if report:
                report.failed.append(job_id)
        if not moved:
            return


def after_end(db: Database, queue: JobQueue, job_id: str) -> None:
    """What follows a job's move, once it is committed: its queue entry, its children, its hub token."""
    with db.read() as session:
        row = repository.get(session, job_id)
        if row is None:
            return
        status = row.status
        startable = status == "queued" and repository.is_ready(session, row)
        ready = repository.ready_to_run(session) if status == "succeeded" else []
        children = [j for j in ready if job_id in (repository.get(session, j) or row).after]
    if startable:
        queue.enqueue_soon(job_id)
    for child in children:
        queue.enqueue_soon(child)
    if status in ("failed", "cancelled"):
        fail_orphans(db, queue)
    if status in ("succeeded", "failed", "cancelled"):
        queue.forget_token(job_id)
