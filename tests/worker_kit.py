"""A real worker process over a real queue and database, and jobs of the tiny model for it."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import make_url, select

from service.db import Database
from service.files.service import Upload
from service.jobs import repository
from service.jobs import service as jobs
from service.migrate import upgrade
from service.models import EventRow, JobRow, RunRow
from service.queue import JobQueue
from service.reconcile import reconcile
from service.settings import Settings
from service.specs import parse_spec

ROOT = Path(__file__).parent.parent
GPU_SETTINGS = {"gpu_policy", "gpu_engines", "gpu_grace_seconds", "gpu_lease_seconds"}


@dataclass
class Host:
    """A database, a queue and a data folder; `worker()` starts a worker process on them."""

    settings: Settings
    db: Database
    queue: JobQueue
    log: Path

    def upload(self, path: Path) -> str:
        upload = Upload(self.settings)
        upload.begin(path.name)
        upload.write(path.read_bytes())
        return upload.keep(self.db, "fine-tune").id

    def submit(self, spec: dict[str, Any]) -> str:
        row, _ = jobs.create(self.db, self.queue, self.settings, parse_spec(spec), key=None, token=None)
        return row.id

    def job(self, job_id: str) -> JobRow:
        with self.db.read() as session:
            return session.get_one(JobRow, job_id)

    def runs(self, job_id: str) -> list[RunRow]:
        with self.db.read() as session:
            return list(session.scalars(select(RunRow).where(RunRow.job_id == job_id).order_by(RunRow.id)))

    def events(self, job_id: str, type: str | None = None) -> list[EventRow]:
        with self.db.read() as session:
            events = repository.events_after(session, job_id, 0, limit=100_000)
        return [e for e in events if type in (None, e.type)]

    def metrics(self, job_id: str) -> dict[str, list[dict[str, Any]]]:
        with self.db.read() as session:
            return repository.metrics(session, job_id)

    def reconcile(self) -> Any:
        return reconcile(self.db, self.queue, self.settings)

    def wait(self, job_id: str, until: Callable[[JobRow], bool], seconds: float = 400) -> JobRow:
        """Poll a job, reconciling as the API does, until it is as wanted."""
        deadline = time.monotonic() + seconds
        last = 0.0
        while True:
            row = self.job(job_id)
            if until(row):
                return row
            if time.monotonic() > deadline:
                log = self.settings.job_dir(job_id) / "log.txt"
                tail = log.read_text()[-3000:] if log.exists() else "(no log)"
                raise AssertionError(
                    f"job is {row.status} after {seconds} s: {row.error} {row.progress}\n{tail}\n{self.log.read_text()[-2000:]}"
                )
            if time.monotonic() - last > 1:
                last = time.monotonic()
                self.reconcile()
            time.sleep(0.02)

    def status(self, job_id: str, *wanted: str, seconds: float = 400) -> JobRow:
        return self.wait(job_id, lambda row: row.status in wanted, seconds)

    def step(self, job_id: str, step: int, seconds: float = 400) -> JobRow:
        """Wait until a running job has logged that step."""

        def reached(row: JobRow) -> bool:
            points = self.metrics(job_id)["train"]
            return row.status == "running" and bool(points) and points[-1]["step"] >= step

        return self.wait(job_id, reached, seconds)

    @contextmanager
    def worker(self, *command: str) -> Iterator[subprocess.Popen[bytes]]:
        env = {k: v for k, v in os.environ.items() if not k.startswith("LORRY_")}
        for name in (
            "data_dir",
            "database_url",
            "redis_url",
            "queue",
            "heartbeat_seconds",
            "heartbeat_timeout_seconds",
            "shutdown_seconds",
        ):
            env[f"LORRY_{name.upper()}"] = str(getattr(self.settings, name))
        env |= {
            f"LORRY_{n.upper()}": str(getattr(self.settings, n)) for n in GPU_SETTINGS & self.settings.model_fields_set
        }
        if self.settings.storage_url:
            env |= {"LORRY_DATA_DIR": self.settings.storage_url, "LORRY_CACHE_DIR": str(self.settings.data_dir)}
            env["LORRY_STORAGE_OPTIONS"] = json.dumps(self.settings.storage_options)
        env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with open(self.log, "ab") as log:
            process = subprocess.Popen(
                [sys.executable, *(command or ("-m", "worker.run"))],
                env=env,
                stdout=log,
                stderr=log,
                cwd=self.settings.data_dir,
                start_new_session=True,
            )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


@contextmanager
def host_on(settings: Settings, log: Path) -> Iterator[Host]:
    """A host on a database that is migrated first."""
    upgrade(settings.sqlalchemy_url)
    db, queue = Database(settings.sqlalchemy_url), JobQueue(settings.redis_url, settings.queue)
    try:
        yield Host(settings, db, queue, log)
    finally:
        db.dispose()
        queue.redis.close()


def child_of(process: subprocess.Popen[bytes], seconds: float = 30) -> int:
    """Pid of the worker's forked child."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        if children:
            return int(children[0])
        time.sleep(0.02)
    raise AssertionError("the worker has no child")


def gone(pid: int, seconds: float = 30) -> bool:
    """Whether a process has ended (a zombie has) within the time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


@contextmanager
def stopped(host: Host, *pids: int) -> Iterator[None]:
    """Processes that stand still, none of them within a transaction: on SQLite it would hold up every other writer.

    They may be continued, and end, meanwhile.
    """
    for _ in range(100):
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        if can_write(host):
            break
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        time.sleep(random.uniform(0, 0.05))  # at another point of what they do over and over
    else:
        raise AssertionError("they are always in a transaction")
    try:
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def can_write(host: Host) -> bool:
    """Whether nobody holds the database's write lock, waiting a moment for it."""
    if not host.db.sqlite:
        return True
    path = make_url(host.settings.sqlalchemy_url).database
    assert path is not None
    with closing(sqlite3.connect(path, timeout=0.3, isolation_level=None)) as connection:
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            return False
        connection.execute("ROLLBACK")
    return True


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
