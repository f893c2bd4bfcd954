"""Queries on uploads."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from service.errors import NotFound
from service.ids import is_id
from service.jobs.states import FINAL
from service.models import FileRow, JobRow


def require(session: Session, file_id: str, *, param: str | None = None) -> FileRow:
    """The upload's row. Raises NotFound (file_not_found)."""
    row = session.get(FileRow, file_id) if is_id(file_id, "file") else None
    if row is None:
        raise _missing(file_id, param)
    return row


def _missing(file_id: str, param: str | None) -> NotFound:
    message = f"no file {file_id!r}"
    return NotFound(f"{param}: {message}" if param else message, param=param, code="file_not_found")


def hold(session: Session, file_id: str, *, param: str) -> FileRow:
    """As require, and nobody deletes the file before the transaction ends (SQLite has one writer at a time anyway)."""
    row = require(session, file_id, param=param)
    locked = session.scalar(select(FileRow.id).where(FileRow.id == file_id).with_for_update(read=True))
    if locked is None:  # deleted between the two
        raise _missing(file_id, param)
    return row


def list_page(
    session: Session, *, purpose: str | None, limit: int, after: str | None
) -> tuple[Sequence[FileRow], bool]:
    query = select(FileRow).order_by(FileRow.id.desc()).limit(limit + 1)
    if purpose:
        query = query.where(FileRow.purpose == purpose)
    if after:
        query = query.where(FileRow.id < after)
    rows = session.scalars(query).all()
    return rows[:limit], len(rows) > limit


def lock(session: Session, file_id: str) -> FileRow | None:
    return session.scalar(select(FileRow).where(FileRow.id == file_id).with_for_update())


def used_by(session: Session, file_id: str) -> str | None:
    """Id of an unfinished job that reads this file."""
    uses = or_(*(JobRow.spec[("dataset", name)].as_string() == file_id for name in ("file_id", "eval_file_id")))
    return session.scalar(select(JobRow.id).where(JobRow.status.not_in(FINAL), uses).limit(1))
