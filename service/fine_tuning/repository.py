"""Queries on training jobs as OpenAI's API lists them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from service.models import EventRow, JobRow

KINDS = ("cpt", "ift")
EVENTS = ("status", "metrics", "checkpoint", "log")  # progress is what `estimated_finish` and metrics say


def list_page(
    session: Session, *, limit: int, after: str | None, metadata: Mapping[str, str]
) -> tuple[Sequence[JobRow], bool]:
    """Newest first, those older than the job `after` that have all of `metadata`; and whether more follow."""
    query = select(JobRow).where(JobRow.kind.in_(KINDS)).order_by(JobRow.id.desc()).limit(limit + 1)
    if after:
        query = query.where(JobRow.id < after)
    each = func.json_each if session.get_bind().dialect.name == "sqlite" else func.json_each_text
    for key, value in metadata.items():  # compared as values: in a JSON path quotes and braces mean something
        if "\0" in key + value:
            return [], False  # none is stored, and Postgres takes none
        pairs = each(JobRow.spec["metadata"]).table_valued("key", "value")
        query = query.where(select(pairs.c.key).where(pairs.c.key == key, pairs.c.value == value).exists())
    rows = session.scalars(query).all()
    return rows[:limit], len(rows) > limit


def events_before(session: Session, job_id: str, seq: int | None, limit: int) -> tuple[Sequence[EventRow], bool]:
    """Newest first, those older than event `seq`; and whether more follow."""
    query = select(EventRow).where(EventRow.job_id == job_id, EventRow.type.in_(EVENTS))
    if seq is not None:
        query = query.where(EventRow.seq < seq)
    rows = session.scalars(query.order_by(EventRow.seq.desc()).limit(limit + 1)).all()
    return rows[:limit], len(rows) > limit
