"""A recipe in several processes, one a device: torchrun's agent starts and watches them, here their Progress is served.

The processes (worker/rank.py) are given spec and context over a socket, and rank 0 reports over it. So SQL, the data root
and what is asked of the run stay with the job's process, which loads no model.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

from service.errors import JobFailure
from service.jobs.repository import Fenced
from service.settings import Settings
from worker.outcome import Context, Interrupted, Outcome, Paths
from worker.run import describe
from worker.tasks import classify

log = logging.getLogger("lorry.worker")
MODULE = "worker.rank"
SOCKET, PARENT = "LORRY_RANK_SOCKET", "LORRY_RANK_PARENT"
_AGENTS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # torchrun's agent sets handlers for these
LAST_LINES, LAST_CHARACTERS = 8, 1500


@dataclass(frozen=True)
class Task:
    """What every rank is given."""

    spec: dict[str, Any]
    devices: list[str]
    paths: Paths
    settings: Settings
    about: dict[str, Any]
    token: str | None


@dataclass(frozen=True)
class Ended:
    """How a rank says it ended: with its outcome, or with what became of it instead."""

    outcome: Outcome | None = None
    ask: Any = None  # Interrupted
    fenced: bool = False
    failure: JobFailure | None = None


def run(spec: Any, context: Context, devices: list[str]) -> Outcome:
    """Run a spec's recipe in as many processes as there are `devices` (CUDA's names for them, or "cpu").

    Returns rank 0's outcome. Raises JobFailure, Interrupted and Fenced; no process is left then.
    """
    task = Task(spec.model_dump(mode="json"), devices, context.paths, context.settings, context.about, context.token)
    with tempfile.TemporaryDirectory(prefix="lorry-ranks-") as name:  # nobody else may enter it
        folder = Path(name)
        with _Server(folder / "socket", task, context.progress) as server:
            exits = _launch({SOCKET: str(folder / "socket"), PARENT: str(os.getpid())}, len(devices), folder)
        return _settle(server.ended, exits, devices, folder)


class _Server:
    """Hands the task to each rank that calls, and does on the Progress what rank 0 says."""

    def __init__(self, path: Path, task: Task, progress: Any) -> None:
        self.task, self.progress = task, progress
        self.ended: dict[int, Ended] = {}  # by rank, in the order in which they said so
        self.listener = Listener(str(path), "AF_UNIX", backlog=len(task.devices))

    def __enter__(self) -> _Server:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.close()

    def _accept(self) -> None:
        for _ in self.task.devices:
            try:
                connection = self.listener.accept()
            except OSError:  # closed: the run is over
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: Connection) -> None:
        with suppress(EOFError, OSError), connection:  # a rank that dies; the agent says how
            rank = connection.recv()
            connection.send(self.task)
            while True:
                said = connection.recv()
                if isinstance(said, Ended):
                    self.ended[rank] = said
                    connection.send(None)
                    return
                name, arguments = said
                try:
                    connection.send((getattr(self.progress, name)(*arguments), None))
                except Fenced:
                    connection.send((None, Ended(fenced=True)))
                except Exception as error:
                    log.exception("the run's progress could not be stored")
                    connection.send((None, Ended(failure=classify(error))))


def _launch(environment: dict[str, str], size: int, logs: Path) -> dict[int, int]:
    """Start the ranks and wait until they have ended, all of them if one fails. Returns the exit codes of those that failed."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torchelastic-events-null").setLevel(logging.WARNING)
    # Rank 0 writes into the job's log, as the one process of another job does; the others' last words are read from files.
    redirects = {rank: Std.ALL if rank else Std.NONE for rank in range(size)}
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=size,
        run_id=secrets.token_hex(8),
        # Not c10d, as --standalone has it: it keeps pickles in a store that listens on all of the host's addresses.
        rdzv_backend="static",
        rdzv_endpoint=f"127.0.0.1:{_free_port()}",
        rdzv_configs={"rank": 0},
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(str(logs), redirects=redirects),
    )
    handlers = {number: signal.getsignal(number) for number in _AGENTS}
    os.environ.update(environment)
    try:
        elastic_launch(config, sys.executable)("-m", MODULE)
    except ChildFailedError as error:
        return {rank: failure.exitcode for rank, failure in error.failures.items()}
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for name in environment:
            del os.environ[name]
    return {}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _settle(ended: dict[int, Ended], exits: dict[int, int], devices: list[str], logs: Path) -> Outcome:
    """What the ranks' ends amount to. One that dies takes the others along: the cause is looked for, not what came of it."""
    first = ended.get(0, Ended())
    if first.fenced:
        raise Fenced
    if first.ask:
        raise Interrupted(first.ask)
    failures = {rank: end.failure for rank, end in ended.items() if end.failure}
    known = [f for f in failures.values() if f.code != "internal_error"]
    silent = [rank for rank in exits if rank not in ended]
    for rank in {*failures, *silent} - {0}:  # what rank 0 prints is in the job's log already
        log.error("rank %d%s", rank, _last_words(logs, rank))
    if known or (failures and not silent):
        raise known[0] if known else next(iter(failures.values()))
    if silent:
        rank = silent[0]
        status = -exits[rank] if exits[rank] < 0 else exits[rank] << 8
        raise JobFailure(
            "worker_killed",
            f"rank {rank} of {len(devices)} (device {devices[rank]}): {describe(status)}{_last_words(logs, rank)}",
            retry=True,
        )
    if first.outcome is None:
        raise JobFailure("worker_killed", "rank 0 ended without a word", retry=True)
    return first.outcome


def _last_words(logs: Path, rank: int) -> str:
    """The end of what a rank printed; rank 0's is in the job's log."""
    lines: list[str] = []
    for name in ("stdout.log", "stderr.log"):
        for path in logs.glob(f"**/attempt_0/{rank}/{name}"):
            lines += path.read_text("utf-8", "replace").splitlines()[-LAST_LINES:]
    text = "\n".join(line for line in lines if line.strip())[-LAST_CHARACTERS:]
    return f"; its last output: {text}" if text else ""
