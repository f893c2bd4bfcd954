"""What SQL says against what the queue and the heartbeats say. Run at start and every few seconds, by the API and by
each worker; every step is a compare-and-set, so any number of processes may run it at once.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field

from redis.exceptions import RedisError
from sqlalchemy.exc import OperationalError

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


_away = float("-inf")  # when this process last found the database away (monotonic seconds)


def reconcile(db: Database, queue: JobQueue, settings: Settings) -> Report:
    """Lost runs go back to the queue; children of failed jobs fail; queued jobs that the queue lacks are put there."""
    global _away
    report = Report()
    try:
        with db.read() as session:
            before = time.time() - settings.heartbeat_timeout_seconds
            lost = [(r.id, r.run_id) for r in repository.stale(session, before)]
    except OperationalError:
        _away = time.monotonic()
        raise
    if time.monotonic() - _away < settings.heartbeat_timeout_seconds:
        lost = []  # no run could write a heartbeat while the database was away: give them time to
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
    if run_id is None:
        return
    with db.write() as session:
        row = repository.get(session, job_id)
        if row is None or row.run_id != run_id:
            return
        if row.attempt >= settings.max_attempts:
            message = f"attempt {row.attempt} of {settings.max_attempts}: {reason}"
            error = {"code": code, "message": message, "rows": []}
            ended = repository.end_run(session, job_id, run_id, "failed", reason=reason, error=error)
        else:
            ended = repository.end_run(session, job_id, run_id, "queued", reason=reason, attempt=row.attempt + 1)
    if ended is None:
        return
    if report:
        (report.requeued if ended == "queued" else report.failed).append(job_id)
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
        children = repository.ready_to_run(session, child_of=job_id) if status == "succeeded" else []
    if startable:
        queue.enqueue_soon(job_id)
    for child in children:
        queue.enqueue_soon(child)
    if status in ("failed", "cancelled"):
        fail_orphans(db, queue)
    if status in ("succeeded", "failed", "cancelled"):
        queue.forget_token(job_id)
