"""The registry of adapters: a reference to the files behind it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.errors import NotFound
from service.ids import is_id
from service.models import AdapterRow, CheckpointRow, JobRow

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_MAX_STEP = 2**31 - 1  # the column's range


@dataclass(frozen=True)
class Resolved:
    """What a reference stands for. `template` is a StoredTemplate as a dict; `row` is None for a checkpoint of a job
    whose adapter has no row (any more)."""

    ref: str
    name: str
    step: int | None
    path: Path
    template: dict[str, Any]
    base: str
    row: AdapterRow | None


def resolve(session: Session, ref: str) -> Resolved:
    """Find `name`, `name@step` or `job_…@step`. Raises NotFound (adapter_not_found)."""
    name, at, step = ref.partition("@")
    if at:
        return _resolve_checkpoint(session, ref, name, step)
    row = _row(session, name)
    if row is None:
        raise _missing(f"no adapter {name!r}")
    if not row.ready or row.path is None:
        raise _missing(f"adapter {name!r} is still being made by job {row.job_id}")
    return Resolved(ref, name, row.step, Path(row.path), row.template, row.base, row)


def checkpoint_of(session: Session, job: JobRow, name: str, step: str) -> CheckpointRow:
    """A job's checkpoint by the step as text; `name` is for the message. Raises NotFound (adapter_not_found)."""
    if not (step.isascii() and step.isdecimal() and len(step) <= 10 and int(step) <= _MAX_STEP):
        raise _missing(f"'{name}@{step}' is no checkpoint: a checkpoint is named adapter@step")
    checkpoint = session.get(CheckpointRow, (job.id, int(step)))
    if checkpoint is None:
        have = select(CheckpointRow.step).where(CheckpointRow.job_id == job.id).order_by(CheckpointRow.step)
        steps = ", ".join(map(str, session.scalars(have))) or "none"
        raise _missing(f"adapter {name!r} has no checkpoint at step {int(step)}; it has {steps}")
    return checkpoint


def _resolve_checkpoint(session: Session, ref: str, name: str, step: str) -> Resolved:
    row = _row(session, name)
    job_id = row.job_id if row else name if is_id(name, "job") else None
    job = session.get(JobRow, job_id) if job_id else None
    if job is None:
        raise _missing(f"no adapter {name!r}")
    checkpoint = checkpoint_of(session, job, name, step)
    path = Path(checkpoint.path)
    try:
        template = json.loads((path / "lorry_template.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _missing(f"the files of checkpoint {ref!r} are gone or unreadable") from error
    if row is None:
        row = session.scalar(select(AdapterRow).where(AdapterRow.job_id == job.id))
    return Resolved(ref, name, checkpoint.step, path, template, job.spec["model"]["name"], row)


def _row(session: Session, name: str) -> AdapterRow | None:
    return session.get(AdapterRow, name) if _NAME.fullmatch(name) else None  # Postgres refuses some other text


def _missing(message: str) -> NotFound:
    return NotFound(message, code="adapter_not_found")
