"""What can be done to a job over HTTP. Each function is one transaction, then what follows from it."""

from __future__ import annotations

import hashlib
import json
import logging
import time

from redis.exceptions import RedisError
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from service.db import Database
from service.errors import Conflict, LorryError, NotFound, Unavailable
from service.ids import is_id, new_id
from service.jobs import repository
from service.jobs.door import AnyJobSpec, admit, name_taken
from service.jobs.states import ACTIVE, FINAL
from service.logs import about_job, redact
from service.models import AdapterRow, JobRow
from service.queue import JobQueue
from service.reconcile import after_end
from service.settings import Settings
from service.specs import ExportSpec, IftSpec
from service.storage import open_storage

log = logging.getLogger("lorry.jobs")
_TRIES = 10  # a state that changes between our look and our move is looked at again


def require(session: Session, job_id: str) -> JobRow:
    """The job's row. Raises NotFound (job_not_found)."""
    row = repository.get(session, job_id) if is_id(job_id, "job") else None
    if row is None:
        raise NotFound(f"no job {job_id!r}", code="job_not_found")
    return row


def create(
    db: Database, queue: JobQueue, settings: Settings, spec: AnyJobSpec, *, key: str | None, token: str | None
) -> tuple[JobRow, bool]:
    """Make a job of a spec, or find the one that `key` made; (row, whether it was found).

    Stored and committed before it is put on the queue: with the queue away the job waits in SQL, and reconcile()
    brings it there later.
    """
    digest = _digest(spec)
    if key is not None:
        found = _by_key(db, key, digest)
        if found:
            return found, True
    job_id = new_id("job")
    if token:
        try:
            queue.keep_token(job_id, token)  # before the row: a worker may start the job the moment it is there
        except RedisError as error:
            raise Unavailable("the queue, which alone may hold a hub token, is out of reach") from error
    try:
        with db.write() as session:
            row = _store(session, settings, job_id, spec, key, digest)
    except BaseException as error:
        if token:
            queue.forget_token(job_id)
        if not isinstance(error, LorryError | IntegrityError):
            raise
        # A request with the same key may have come first, taken the name, and committed while this one waited.
        found = _by_key(db, key, digest) if key is not None else None
        if found:
            return found, True
        if isinstance(error, IntegrityError):
            raise name_taken(spec.adapter) from error
        raise
    log.info("%s made: %s %s", row.id, row.kind, row.adapter, extra=about_job(row.id))
    if not row.after:
        queue.enqueue_soon(row.id, row.spec)
    else:
        after_end(db, queue, row.id)
    return row, False


def _store(session: Session, settings: Settings, job_id: str, spec: AnyJobSpec, key: str | None, digest: str) -> JobRow:
    admitted = admit(session, settings, spec)
    spec = admitted.spec
    now = time.time()
    row = JobRow(
        id=job_id,
        kind=spec.kind,
        status="queued",
        adapter=spec.adapter,
        spec=spec.model_dump(mode="json"),
        after=list(dict.fromkeys(spec.after)),
        idempotency_key=key,
        idempotency_hash=digest if key is not None else None,
        lineage=admitted.lineage,
        created_at=now,
    )
    names = []
    if not isinstance(spec, ExportSpec):
        parent = spec.init.adapter if isinstance(spec, IftSpec) and spec.init else None
        names.append(
            AdapterRow(
                name=spec.adapter, job_id=row.id, kind=spec.kind, base=admitted.base, parent=parent, created_at=now
            )
        )
    repository.add_job(session, row, *names)
    return row


def _digest(spec: AnyJobSpec) -> str:
    body = json.dumps(spec.model_dump(mode="json", exclude_unset=True), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(body.encode()).hexdigest()


def _by_key(db: Database, key: str, digest: str) -> JobRow | None:
    with db.read() as session:
        row = repository.by_key(session, key)
    if row is not None and row.idempotency_hash != digest:
        message = f"Idempotency-Key: {key!r} was used for job {row.id}, with another body"
        raise Conflict(message, param="Idempotency-Key", code="idempotency_conflict")
    return row


def cancel(db: Database, queue: JobQueue, job_id: str) -> tuple[JobRow, bool]:
    """Cancel a job: at once if it waits, else ask its run. (row, whether it is done). Raises NotFound, Conflict."""
    for _ in range(_TRIES):
        with db.write() as session:
            row = require(session, job_id)
            _not_final(row, "cancelled")
            moved = repository.transition(
                session, job_id, ["queued", "paused"], "cancelled", reason="cancelled by request"
            )
            asked = not moved and repository.request_control(session, job_id, "cancel")
        if moved:
            queue.remove(job_id)
            after_end(db, queue, job_id)
        if moved or asked:
            return _reload(db, job_id), moved
    raise _restless(job_id)


def pause(db: Database, queue: JobQueue, job_id: str) -> tuple[JobRow, bool]:
    """Pause a job: at once if it waits, else ask its run. (row, whether it is done). Raises NotFound, Conflict."""
    for _ in range(_TRIES):
        with db.write() as session:
            row = require(session, job_id)
            _not_final(row, "paused")
            if row.status == "paused":
                raise Conflict(f"job {job_id} is paused already", code="job_paused")
            if row.kind == "export" and row.status in ACTIVE:
                raise Conflict(
                    "a running export has no checkpoint to go on from; cancel it instead", code="not_pausable"
                )
            moved = repository.transition(session, job_id, ["queued"], "paused", reason="paused by request")
            asked = not moved and repository.request_control(session, job_id, "pause")
            if not moved and not asked and row.control == "cancel":
                raise Conflict(f"job {job_id} is being cancelled", code="job_cancelling")
        if moved:
            queue.remove(job_id)
            after_end(db, queue, job_id)
        if moved or asked:
            return _reload(db, job_id), moved
    raise _restless(job_id)


def resume(db: Database, queue: JobQueue, job_id: str) -> JobRow:
    """Queue a paused job again. Raises NotFound, Conflict."""
    with db.write() as session:
        row = require(session, job_id)
        _not_final(row, "resumed")
        if not repository.transition(session, job_id, ["paused"], "queued", reason="resumed by request"):
            raise Conflict(f"job {job_id} is {row.status}; only a paused job can be resumed", code="not_paused")
    after_end(db, queue, job_id)
    return _reload(db, job_id)


def log_tail(db: Database, settings: Settings, job_id: str, size: int) -> str:
    """The last `size` bytes of a job's log, from a line's start; what its last run's record kept, if the file is gone."""
    storage = open_storage(settings)
    with db.read() as session:
        runs = repository.runs(session, job_id)
        run_id = repository.final_run(session, job_id) or (runs[-1].id if runs else None)
    key = storage.own_key(f"jobs/{job_id}/log.txt", run_id)
    try:
        content = storage.read(key, last=size + 1)
    except FileNotFoundError:
        kept = [line for run in runs[-1:] for line in run.record.get("log_tail", [])]
        return "".join(f"{line}\n" for line in kept)
    if len(content) > size:
        content = content[content.find(b"\n") + 1 :]
    return redact(content.decode(errors="replace"))


def _not_final(row: JobRow, done: str) -> None:
    if row.status in FINAL:
        raise Conflict(f"job {row.id} is {row.status}, which is final: it cannot be {done}", code="job_finished")


def _restless(job_id: str) -> Conflict:
    return Conflict(f"job {job_id} changes its state faster than it can be asked; try again", code="try_again")


def _reload(db: Database, job_id: str) -> JobRow:
    with db.read() as session:
        return require(session, job_id)
