"""The registry of adapters: a reference to the files behind it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from service.adapters import repository
from service.db import Database
from service.engine_client import Target
from service.errors import Conflict, Invalid, NotFound
from service.ids import is_id
from service.models import AdapterRow, CheckpointRow, JobRow
from service.storage import Storage

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

    @property
    def pinned(self) -> bool:
        """Whether it is a pinned adapter itself; its checkpoints are not pinned with it."""
        return self.row is not None and self.row.pinned and self.ref == self.row.name

    @property
    def target(self) -> Target:
        """It, for an engine."""
        own = self.row is not None and bool(self.row.config.get("train_embeddings"))
        return Target(self.ref, self.path, self.base, self.pinned, own)


def resolve(session: Session, storage: Storage, ref: str) -> Resolved:
    """Find `name`, `name@step` or `job_…@step`. Raises NotFound (adapter_not_found) and StorageUnavailable."""
    name, at, step = ref.partition("@")
    if at:
        return _resolve_checkpoint(session, storage, ref, name, step)
    row = _ready(session, name)
    return Resolved(ref, name, row.step, storage.place(str(row.path)), row.template, row.base, row)


def _ready(session: Session, name: str) -> AdapterRow:
    row = _row(session, name)
    if row is None:
        raise _missing(f"no adapter {name!r}")
    if not row.ready or row.path is None:
        raise _missing(f"adapter {name!r} is still being made by job {row.job_id}")
    return row


def checkpoint_of(session: Session, job: JobRow, name: str, step: str, *, hold: bool = False) -> CheckpointRow:
    """A job's checkpoint by the step as text; `name` is for the message. Raises NotFound (adapter_not_found).

    With `hold` it is not let go (service.retention) before the transaction's end.
    """
    if not (step.isascii() and step.isdecimal() and len(step) <= 10 and int(step) <= _MAX_STEP):
        raise _missing(f"'{name}@{step}' is no checkpoint: a checkpoint is named adapter@step")
    checkpoint = session.get(CheckpointRow, (job.id, int(step)), with_for_update={"read": True} if hold else None)
    if checkpoint is None:
        have = select(CheckpointRow.step).where(CheckpointRow.job_id == job.id).order_by(CheckpointRow.step)
        steps = ", ".join(map(str, session.scalars(have))) or "none"
        raise _missing(f"adapter {name!r} has no checkpoint at step {int(step)}; it has {steps}")
    return checkpoint


def _resolve_checkpoint(session: Session, storage: Storage, ref: str, name: str, step: str) -> Resolved:
    row = _row(session, name)
    job_id = row.job_id if row else name if is_id(name, "job") else None
    job = session.get(JobRow, job_id) if job_id else None
    if job is None:
        raise _missing(f"no adapter {name!r}")
    checkpoint = checkpoint_of(session, job, name, step)
    try:
        template = json.loads(storage.read(f"{checkpoint.path}/lorry_template.json"))
    except (OSError, ValueError) as error:
        raise _missing(f"the files of checkpoint {ref!r} are gone or unreadable") from error
    if row is None:
        row = session.scalar(select(AdapterRow).where(AdapterRow.job_id == job.id))
    path = storage.place(checkpoint.path)
    return Resolved(ref, name, checkpoint.step, path, template, job.spec["model"]["name"], row)


def _row(session: Session, name: str) -> AdapterRow | None:
    return session.get(AdapterRow, name) if _NAME.fullmatch(name) else None  # Postgres refuses some other text


def _missing(message: str) -> NotFound:
    return NotFound(message, code="adapter_not_found")


def require(session: Session, name: str) -> AdapterRow:
    """A finished adapter's row. Raises NotFound (adapter_not_found)."""
    if "@" in name:
        raise _missing(f"{name!r} is a checkpoint; this call takes an adapter's name")
    return _ready(session, name)


def change(db: Database, name: str, *, new_name: str | None, pinned: bool | None) -> AdapterRow:
    """Rename or pin. Raises NotFound, Conflict (adapter_exists, adapter_in_use)."""
    try:
        with db.write() as session:
            row = _take(session, name)
            if pinned is not None:
                row.pinned = pinned
            if new_name is not None and new_name != name:
                if is_id(new_name, "job"):
                    raise Invalid("name: this form stands for a job's checkpoints", param="name")
                _unneeded(session, row, "renamed")
                if session.get(AdapterRow, new_name) is not None:
                    raise taken(new_name)
                # The job keeps its spec as it was sent, and follows the adapter by its name of today.
                session.execute(update(JobRow).where(JobRow.id == row.job_id).values(adapter=new_name))
                session.execute(update(AdapterRow).where(AdapterRow.parent == name).values(parent=new_name))
                steps = AdapterRow.parent.startswith(f"{name}@", autoescape=True)
                parent = new_name + func.substr(AdapterRow.parent, len(name) + 1)
                session.execute(update(AdapterRow).where(steps).values(parent=parent))
                row.name = new_name
            session.flush()
    except IntegrityError as error:
        raise taken(new_name or name) from error
    return row


def delete(db: Database, storage: Storage, name: str) -> None:
    """Forget an adapter, then remove its files and its job's checkpoints. Raises NotFound, Conflict (adapter_in_use)."""
    with db.write() as session:
        row = _take(session, name)
        _unneeded(session, row, "deleted")
        checkpoints = repository.checkpoints(session, row.job_id)
        for checkpoint in checkpoints:
            session.delete(checkpoint)
        session.delete(row)
    # The rows go first: a crash here leaves files without a row, never a row without its files.
    for path in [row.path, *(c.path for c in checkpoints)]:
        if path is not None:
            storage.remove(path)


def _take(session: Session, name: str) -> AdapterRow:
    require(session, name)
    row = repository.lock(session, name)
    if row is None:
        raise _missing(f"no adapter {name!r}")
    return row


def _unneeded(session: Session, row: AdapterRow, done: str) -> None:
    job = repository.needed_by(session, row)
    if job:
        message = f"adapter {row.name!r} cannot be {done}: job {job} needs it; cancel the job or wait for its end"
        raise Conflict(message, code="adapter_in_use")


def taken(name: str, why: str = "exists or is being made") -> Conflict:
    return Conflict(f"name: {name!r} {why}", param="name", code="adapter_exists")
