"""Progress on SQL: short transactions, each fenced by the run id; a heartbeat thread; what clients asked of the run."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from sqlalchemy import delete, select
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from service.db import Database
from service.jobs import repository
from service.jobs.repository import Fenced
from service.logs import redact
from service.models import CheckpointRow, JobRow, RunRow
from service.settings import Settings
from service.storage import open_storage
from worker.outcome import Ask
from worker.workspace import Workspace

log = logging.getLogger("lorry.worker")
POLL_SECONDS = 0.05  # at most this often a step asks SQL whether to pause or cancel
PROGRESS_SECONDS = 1.0
PERSIST_SECONDS = 120.0  # how long a run waits for a database that is away
T = TypeVar("T")


class SqlProgress:
    """The Progress of a run. Use as a context manager: it owns the heartbeat thread."""

    def __init__(
        self, db: Database, settings: Settings, job_id: str, run_id: str, workspace: Workspace | None = None
    ) -> None:
        self.db, self.settings, self.job_id, self.run_id = db, settings, job_id, run_id
        self.workspace = workspace or Workspace(open_storage(settings), settings, job_id, run_id)
        self.on_phase: Callable[[str], None] = lambda name: None  # called once a phase has been told, before its work
        self.stopping = False  # set by a signal: the worker shuts down
        self._fenced = False
        self._polled = self._written = 0.0
        self._control: str | None = None
        self._progress: dict[str, Any] = {}
        self._checkpoints: dict[int, dict[str, Any]] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()

    def phase(self, name: str) -> None:
        log.info("phase %s", name)
        self._progress = {**self._progress, "phase": name}
        self._write_progress()
        self.on_phase(name)

    def eta(self) -> float | None:
        """Seconds until the steps are expected to be done, if that is known."""
        seconds = self._progress.get("eta_seconds")
        return float(seconds) if isinstance(seconds, (int, float)) else None

    def log(self, message: str) -> None:
        log.info("%s", message)
        self._event("log", {"message": redact(message)})

    def started(self) -> None:
        def write(session: Session) -> None:
            if repository.transition(session, self.job_id, ["preparing"], "running", run_id=self.run_id):
                return
            repository.own(session, self.job_id, self.run_id)  # it is done already, or raises Fenced

        persist(self.db, write)

    def steps(self, values: dict[str, Any]) -> None:
        last = "step" in values and values["step"] >= values["total_steps"]
        self._progress = {**self._progress, **finite(values)}
        if last or time.monotonic() - self._written >= PROGRESS_SECONDS:
            self._write_progress()

    def metrics(self, split: Literal["train", "eval"], step: int, point: dict[str, Any]) -> None:
        point = finite(point)

        def write(session: Session) -> None:
            repository.own(session, self.job_id, self.run_id)
            repository.put_metrics(session, self.job_id, [(split, step, point)])
            repository.add_event(session, self.job_id, "metrics", {"split": split, "step": step, **point})

        persist(self.db, write)

    def resumed(self, step: int) -> None:
        message = f"resumed from the checkpoint of step {step}"

        def write(session: Session) -> None:
            repository.own(session, self.job_id, self.run_id)
            repository.drop_metrics_after(session, self.job_id, step)
            repository.add_event(session, self.job_id, "log", {"message": message})

        persist(self.db, write)

    def checkpoints(self, present: dict[int, dict[str, Any]]) -> None:
        kept = {step: self.workspace.keep_checkpoint(step, Path(values["path"])) for step, values in present.items()}
        present = {step: {**values, "path": kept[step]} for step, values in present.items()}
        dropped: set[str] = set()

        def write(session: Session) -> None:
            repository.own(session, self.job_id, self.run_id)
            name = session.scalar(select(JobRow.adapter).where(JobRow.id == self.job_id))
            known = {row.step: row for row in repository.checkpoints(session, self.job_id)}
            gone = set(known) - set(present)
            dropped.update(row.path for step, row in known.items() if row.path != present.get(step, {}).get("path"))
            if gone:
                session.execute(
                    delete(CheckpointRow).where(CheckpointRow.job_id == self.job_id, CheckpointRow.step.in_(gone))
                )
            for step, values in finite(present).items():
                if step in known and known[step].path == values["path"]:
                    continue
                session.merge(CheckpointRow(job_id=self.job_id, step=step, created_at=time.time(), **values))
                session.flush()
                data = {"step": step, "loss": values["loss"], "eval_loss": values["eval_loss"]}
                repository.add_event(session, self.job_id, "checkpoint", {**data, "adapter": f"{name}@{step}"})

        persist(self.db, write)
        for path in dropped:
            self.workspace.drop_checkpoint(path)

    def record(self, values: dict[str, Any]) -> None:
        def write(session: Session) -> None:
            repository.own(session, self.job_id, self.run_id)
            row = session.get_one(RunRow, self.run_id)
            row.record = {**row.record, **finite(values)}

        persist(self.db, write)

    def asked(self) -> Ask | None:
        if self._fenced:
            raise Fenced(self.job_id)
        now = time.monotonic()
        if now - self._polled >= POLL_SECONDS:
            self._polled = now
            query = select(JobRow.run_id, JobRow.control).where(JobRow.id == self.job_id)
            row = persist(self.db, lambda session: session.execute(query).one_or_none(), write=False)
            if row is None or row[0] != self.run_id:
                raise Fenced(self.job_id)
            self._control = row[1]
        if self._control in ("pause", "cancel"):
            return self._control  # type: ignore[return-value]
        return "stop" if self.stopping else None

    def _event(self, type: str, data: dict[str, Any]) -> None:
        def write(session: Session) -> None:
            repository.own(session, self.job_id, self.run_id)
            repository.add_event(session, self.job_id, type, data)

        persist(self.db, write)

    def _write_progress(self) -> None:
        self._written = time.monotonic()

        def write(session: Session) -> None:
            repository.own(session, self.job_id, self.run_id, progress=self._progress)
            repository.add_event(session, self.job_id, "progress", self._progress)

        persist(self.db, write)

    def _beat(self) -> None:
        """Say that the run lives. A database out of reach is waited for; a run that lost its job ends at the next step."""
        while not self._end.wait(self.settings.heartbeat_seconds):
            try:
                with self.db.write() as session:
                    repository.own(session, self.job_id, self.run_id)
            except Fenced:
                log.error("job %s has another run now; this one stops", self.job_id)
                self._fenced = True
                return
            except Exception as error:  # whatever it is, the next beat may get through
                log.warning("heartbeat not written: %s", error)


def persist(db: Database, action: Callable[[Session], T], *, write: bool = True, seconds: float = PERSIST_SECONDS) -> T:
    """Do `action` in a session, again and again while the database is away or its disk full, for `seconds`.

    An hour of training must not end because the database was restarted, nor a failure go unreported for want of space.
    An action may be done twice, if the connection broke off after its commit: what it does must allow for that.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            with db.write() if write else db.read() as session:
                return action(session)
        except OperationalError as error:
            if time.monotonic() > deadline:
                raise
            log.warning("database out of reach, trying again: %s", str(error.orig).splitlines()[0])
            time.sleep(1)


def finite(data: Any) -> Any:
    """`data` with NaN and infinity, which JSON does not have, as null: a diverged loss must not break its own report."""
    if isinstance(data, dict):
        return {key: finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
