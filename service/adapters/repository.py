"""Queries on adapters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from service.jobs.states import FINAL
from service.models import AdapterRow, CheckpointRow, JobRow

_REFS = (JobRow.spec[("init", "adapter")].as_string(), JobRow.spec["adapter"].as_string())  # where a spec names one


def list_page(session: Session, *, limit: int, after: str | None) -> tuple[Sequence[AdapterRow], bool]:
    """Finished adapters by name, at most `limit`, those behind `after`; and whether more follow."""
    query = select(AdapterRow).where(AdapterRow.ready).order_by(AdapterRow.name).limit(limit + 1)
    if after:
        query = query.where(AdapterRow.name > after)
    rows = session.scalars(query).all()
    return rows[:limit], len(rows) > limit


def lock(session: Session, name: str) -> AdapterRow | None:
    """The row, held until the transaction's end; jobs that would start from it wait at the door."""
    return session.scalar(select(AdapterRow).where(AdapterRow.name == name).with_for_update())


def needed_by(session: Session, row: AdapterRow) -> str | None:
    """Id of an unfinished job that starts from this adapter, or from one of its checkpoints, or exports it."""
    uses = []
    for source in (row.name, row.job_id):
        for ref in _REFS:
            uses += [ref == source, ref.like(f"{_literal(source)}@%", escape="\\")]
    query = select(JobRow.id).where(JobRow.status.not_in(FINAL), JobRow.id != row.job_id, or_(*uses))
    return session.scalar(query.limit(1))


def checkpoints_named(session: Session, names: Iterable[str]) -> set[str]:
    """`name@step` of the checkpoints, of adapters (or jobs) with these names, that unfinished jobs refer to."""
    found: set[str] = set()
    for ref in _REFS:
        mine = or_(*(ref.like(f"{_literal(name)}@%", escape="\\") for name in names))
        found |= set(session.scalars(select(ref).where(JobRow.status.not_in(FINAL), mine)))
    return found


def _literal(text: str) -> str:
    return text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")


def checkpoints(session: Session, job_id: str) -> Sequence[CheckpointRow]:
    return session.scalars(select(CheckpointRow).where(CheckpointRow.job_id == job_id)).all()
