"""Queries on jobs, and the one way a job changes state: `transition`, a compare-and-set that writes its event too."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from sqlalchemy import Text, cast, delete, func, select, update
from sqlalchemy.dialects.postgresql import insert as pg_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.orm import Session

from service.jobs.states import ACTIVE, FINAL, MOVES, Status
from service.models import AdapterRow, ArtifactRow, CheckpointRow, EventRow, JobRow, MetricRow, RunRow


class Fenced(Exception):
    """This run no longer owns its job: it was taken for dead, and another attempt has it. Write nothing, stop."""


def get(session: Session, job_id: str) -> JobRow | None:
    return session.get(JobRow, job_id)


def by_key(session: Session, key: str) -> JobRow | None:
    return session.scalar(select(JobRow).where(JobRow.idempotency_key == key))


def final_run(session: Session, job_id: str) -> str | None:
    """Id of the run that finished a job; not the latest by time, for hosts' clocks differ."""
    return session.scalar(select(RunRow.id).where(RunRow.job_id == job_id, RunRow.outcome.in_(FINAL)))


def runs(session: Session, job_id: str) -> Sequence[RunRow]:
    return session.scalars(select(RunRow).where(RunRow.job_id == job_id).order_by(RunRow.started_at)).all()


def list_page(
    session: Session, *, kind: str | None, status: str | None, limit: int, after: str | None
) -> tuple[Sequence[JobRow], bool]:
    """Newest first, at most `limit`, those older than the job `after`; and whether more follow."""
    query = select(JobRow).order_by(JobRow.id.desc()).limit(limit + 1)
    if kind:
        query = query.where(JobRow.kind == kind)
    if status:
        query = query.where(JobRow.status == status)
    if after:
        query = query.where(JobRow.id < after)
    rows = session.scalars(query).all()
    return rows[:limit], len(rows) > limit


def add_event(session: Session, job_id: str, type: str, data: dict[str, Any]) -> int:
    """Append an event and return its seq. Call inside a write session; the job row's lock orders writers."""
    seq = session.execute(
        update(JobRow).where(JobRow.id == job_id).values(event_seq=JobRow.event_seq + 1).returning(JobRow.event_seq)
    ).scalar_one()
    session.add(EventRow(job_id=job_id, seq=seq, type=type, data=data, created_at=time.time()))
    session.flush()
    return seq


def add_job(session: Session, row: JobRow, *more: AdapterRow) -> None:
    """Store a new job, its first event, and what refers to it. Raises IntegrityError for a key or name that is taken."""
    row.event_seq = 1
    session.add(row)
    session.flush()  # before what refers to it
    data = {"status": row.status, "attempt": row.attempt, "reason": None, "error": None}
    session.add(EventRow(job_id=row.id, seq=1, type="status", data=data, created_at=row.created_at))
    session.add_all(more)
    session.flush()


def events_after(session: Session, job_id: str, seq: int, limit: int = 1000) -> Sequence[EventRow]:
    query = select(EventRow).where(EventRow.job_id == job_id, EventRow.seq > seq).order_by(EventRow.seq).limit(limit)
    return session.scalars(query).all()


def transition(
    session: Session,
    job_id: str,
    expect: Collection[str],
    to: Status,
    *,
    run_id: str | None = None,
    new_run: str | None = None,
    reason: str | None = None,
    **values: Any,
) -> bool:
    """Move a job to `to` if it is in one of `expect` (and still owned by `run_id`, if given). True if it moved.

    `new_run` makes that run its owner.

    The change, its `status` event and the end of the run row are one transaction: the caller's.
    """
    for state in expect:
        if to not in MOVES[state]:
            raise ValueError(f"no move from {state} to {to}")
    now = time.time()
    if to in FINAL:
        values.setdefault("finished_at", now)
    if to not in ACTIVE:
        values |= {"control": None, "run_id": None, "worker": None, "heartbeat_at": None}
    if new_run is not None:
        values["run_id"] = new_run
    where = [JobRow.id == job_id, JobRow.status.in_(expect)]
    if run_id is not None:
        where.append(JobRow.run_id == run_id)
    old_run = session.scalar(select(JobRow.run_id).where(*where))
    moved = session.execute(update(JobRow).where(*where).values(status=to, **values).returning(JobRow.attempt)).scalar()
    if moved is None:
        return False
    if to not in ACTIVE and old_run is not None:
        session.execute(update(RunRow).where(RunRow.id == old_run).values(outcome=to, reason=reason, finished_at=now))
    if to in ("failed", "cancelled"):
        session.execute(delete(AdapterRow).where(AdapterRow.job_id == job_id, AdapterRow.ready.is_(False)))
    add_event(
        session, job_id, "status", {"status": to, "attempt": moved, "reason": reason, "error": values.get("error")}
    )
    return True


def end_run(
    session: Session, job_id: str, run_id: str, to: Status, *, reason: str | None = None, attempt: int | None = None,
    **values: Any,
) -> Status | None:  # fmt: skip
    """End a live run as `to`; returns the state the job really went to, or None if the run no longer owns it.

    What a client was promised meanwhile holds: a cancel outweighs a pause and going back to the queue, a pause
    outweighs going back. `attempt` is the job's next one, used if it goes back.
    """
    # Locked, so that a client's request falls either before this look or after the move, where it is refused.
    live = select(JobRow).where(JobRow.id == job_id, JobRow.run_id == run_id, JobRow.status.in_(ACTIVE))
    row = session.scalar(live.with_for_update().execution_options(populate_existing=True))
    if row is None:
        return None
    if to in ("queued", "paused") and row.control == "cancel":
        to, reason = "cancelled", "cancelled by a client"
    elif to == "queued" and row.control == "pause":
        to, reason = "paused", "paused by a client"
    if to == "queued" and attempt is not None:
        values["attempt"] = attempt
    return to if transition(session, job_id, [row.status], to, run_id=run_id, reason=reason, **values) else None


def claim(session: Session, job_id: str, run_id: str, worker: str) -> JobRow | None:
    """Take a queued job for a run: queued → preparing. None if it is not queued (done, cancelled, or taken)."""
    now = time.time()
    started = func.coalesce(JobRow.started_at, now)
    values: dict[str, Any] = {"worker": worker, "heartbeat_at": now, "started_at": started, "control": None}
    if not transition(session, job_id, ["queued"], "preparing", new_run=run_id, **values):
        return None
    row = session.get_one(JobRow, job_id, populate_existing=True)
    session.add(RunRow(id=run_id, job_id=job_id, attempt=row.attempt, worker=worker, started_at=now))
    return row


def own(session: Session, job_id: str, run_id: str, **values: Any) -> str | None:
    """Write `values` to the job if the run still owns it, and return what was asked of it (pause, cancel or None).

    Raises Fenced.
    """
    row = session.execute(
        update(JobRow)
        .where(JobRow.id == job_id, JobRow.run_id == run_id, JobRow.status.in_(ACTIVE))
        .values(**{"heartbeat_at": time.time(), **values})
        .returning(JobRow.control)
    ).one_or_none()
    if row is None:
        raise Fenced(job_id)
    control: str | None = row[0]
    return control


def request_control(session: Session, job_id: str, control: str) -> bool:
    """Ask the live run of a job to pause or cancel; a cancel outweighs a pause. False if no run is live."""
    query = update(JobRow).where(JobRow.id == job_id, JobRow.status.in_(ACTIVE))
    if control == "pause":
        query = query.where(JobRow.control.is_(None) | (JobRow.control == "pause"))
    return session.execute(query.values(control=control).returning(JobRow.id)).scalar() is not None


def put_metrics(session: Session, job_id: str, points: Iterable[tuple[str, int, dict[str, Any]]]) -> None:
    """Insert or replace (split, step, data) points of a job's series."""
    rows = [{"job_id": job_id, "split": split, "step": step, "data": data} for split, step, data in points]
    if not rows:
        return
    insert = sqlite_insert if session.get_bind().dialect.name == "sqlite" else pg_insert
    query = insert(MetricRow).values(rows)
    session.execute(
        query.on_conflict_do_update(index_elements=["job_id", "split", "step"], set_={"data": query.excluded.data})
    )


def drop_metrics_after(session: Session, job_id: str, step: int) -> None:
    """Forget points beyond a checkpoint: the resumed run writes those steps again."""
    session.execute(delete(MetricRow).where(MetricRow.job_id == job_id, MetricRow.step > step))


def metrics(session: Session, job_id: str) -> dict[str, list[dict[str, Any]]]:
    """`{"train": [...], "eval": [...]}`, each point with its step, in order of steps."""
    out: dict[str, list[dict[str, Any]]] = {"train": [], "eval": []}
    for row in session.scalars(select(MetricRow).where(MetricRow.job_id == job_id).order_by(MetricRow.step)):
        out[row.split].append({"step": row.step, **row.data})
    return out


def counts(session: Session) -> Sequence[tuple[str, str, int]]:
    """(kind, status, number of jobs)."""
    query = select(JobRow.kind, JobRow.status, func.count()).group_by(JobRow.kind, JobRow.status)
    return [(kind, status, number) for kind, status, number in session.execute(query)]


def active(session: Session) -> Sequence[JobRow]:
    return session.scalars(select(JobRow).where(JobRow.status.in_(ACTIVE)).order_by(JobRow.id)).all()


def last_point(session: Session, job_id: str) -> dict[str, Any]:
    """The newest train and eval points of a job's series, as one."""
    point: dict[str, Any] = {}
    for split in ("eval", "train"):
        query = select(MetricRow).where(MetricRow.job_id == job_id, MetricRow.split == split)
        row = session.scalar(query.order_by(MetricRow.step.desc()).limit(1))
        if row is not None:
            point |= {**row.data, "step": row.step}
    return point


def checkpoints(session: Session, job_id: str) -> Sequence[CheckpointRow]:
    return session.scalars(
        select(CheckpointRow).where(CheckpointRow.job_id == job_id).order_by(CheckpointRow.step)
    ).all()


def artifacts(session: Session, job_id: str) -> Sequence[ArtifactRow]:
    return session.scalars(select(ArtifactRow).where(ArtifactRow.job_id == job_id).order_by(ArtifactRow.path)).all()


def artifact(session: Session, job_id: str, path: str) -> ArtifactRow | None:
    # Postgres takes no NUL in text; no artifact has one.
    return None if "\0" in path else session.get(ArtifactRow, (job_id, path))


def adapter_name(session: Session, job_id: str) -> str | None:
    """Name of the adapter that a job made or is making."""
    return session.scalar(select(AdapterRow.name).where(AdapterRow.job_id == job_id))


# A look at thousands of queued jobs every few seconds: those without parents are told apart in SQL, since reading each
# one's JSON would cost more than all the rest.
_after = cast(JobRow.after, Text)


def ready_to_run(session: Session, *, child_of: str | None = None) -> list[str]:
    """Ids of queued jobs all of whose parents succeeded, oldest first; with `child_of`, only that job's children."""
    queued = JobRow.status == "queued"
    mine = _after.contains(child_of, autoescape=True) if child_of else _after != "[]"
    rows = session.execute(select(JobRow.id, JobRow.after).where(queued, mine)).all()
    parents = {p for _, after in rows for p in after}
    done = set(session.scalars(select(JobRow.id).where(JobRow.id.in_(parents), JobRow.status == "succeeded")))
    ready = [job_id for job_id, after in rows if set(after) <= done]
    if child_of is None:
        ready += session.scalars(select(JobRow.id).where(queued, _after == "[]"))
    return sorted(ready)


def queue_fields(session: Session, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What names a job's queue in its spec, `resources` and `priority`, by id; None for a field that a spec lacks.

    Read out of the JSON by the database: at a wiped queue that held thousands, the whole specs would be megabytes.
    """
    query = select(JobRow.id, JobRow.spec["resources"], JobRow.spec["priority"]).where(JobRow.id.in_(ids))
    return {job_id: {"resources": r, "priority": p} for job_id, r, p in session.execute(query)}


def is_ready(session: Session, row: JobRow) -> bool:
    """Whether all parents of a job succeeded."""
    if not row.after:
        return True
    query = select(func.count()).where(JobRow.id.in_(row.after), JobRow.status == "succeeded")
    return session.execute(query).scalar_one() == len(set(row.after))


def orphaned(session: Session) -> list[tuple[str, str, dict[str, Any] | None]]:
    """(child, failed parent, parent's error) of queued or paused jobs that wait for a job that will never succeed."""
    query = select(JobRow.id, JobRow.after).where(JobRow.status.in_(["queued", "paused"]), _after != "[]")
    waiting = session.execute(query).all()
    parents = {p for _, after in waiting for p in after}
    dead = {
        row.id: row
        for row in session.scalars(
            select(JobRow).where(JobRow.id.in_(parents), JobRow.status.in_(["failed", "cancelled"]))
        )
    }
    out: list[tuple[str, str, dict[str, Any] | None]] = []
    for job_id, after in waiting:
        parent = next((dead[p] for p in after if p in dead), None)
        if parent is not None:
            error = parent.error or {"code": parent.status, "message": f"job {parent.id} was {parent.status}"}
            out.append((job_id, parent.id, error))
    return out
