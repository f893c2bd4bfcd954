"""The faults. Each is done to a running site, held where it lasts, and ended; what follows is left to the parts."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.faults.parts import SHUTDOWN, TIMEOUT, Part, Site

Act = Callable[[Site, random.Random, bool], str]


@dataclass(frozen=True)
class Fault:
    """`act` does it and returns what exactly was done, or "" if there was nothing to do it to."""

    name: str
    act: Act
    breaks: frozenset[str] = frozenset()  # what a client may see broken off meanwhile: api | engine | database | disk


def faults(here: Site) -> list[Fault]:
    """All that can be done on this site, by this user."""
    api, engine = frozenset({"api"}), frozenset({"engine"})
    database = frozenset({"database"})
    found = [
        Fault("kill -9 child", _to_child(signal.SIGKILL)),
        Fault("kill -9 worker", _to_part("worker", signal.SIGKILL)),
        Fault("kill -9 engine", _to_part("engine", signal.SIGKILL), engine),
        Fault("kill -9 api", _to_part("api", signal.SIGKILL), api),
        Fault("kill -9 queue", _to_part("queue", signal.SIGKILL)),
        Fault("kill -9 queue, data wiped", _wipe_queue),
        Fault("SIGTERM child", _to_child(signal.SIGTERM)),
        Fault("SIGTERM worker", _to_part("worker", signal.SIGTERM)),
        Fault("SIGTERM engine", _to_part("engine", signal.SIGTERM), engine),
        Fault("SIGTERM api", _to_part("api", signal.SIGTERM), api),
        Fault("SIGTERM queue", _to_part("queue", signal.SIGTERM)),
        Fault("SIGSTOP child", _stop_child),
        Fault("SIGSTOP worker", _stop_worker),
        Fault("SIGSTOP worker and child", _stop_both),
        Fault("queue hangs", _hang_queue),
        Fault("queue unreachable", _no_queue),
    ]
    if here.kind == "postgres":
        found += [
            Fault("kill -9 postgres", _to_part("postgres", signal.SIGKILL), database),
            Fault("SIGTERM postgres", _to_part("postgres", signal.SIGINT), database),  # a "fast" stop, as systemd's
        ]
    if here.mounted:
        found += [
            Fault("disk full: data", _full("data"), frozenset({"disk"})),
            Fault("disk full: database", _full("database"), frozenset({"disk", "database"})),
        ]
    if here.faketime:
        found += [Fault("clock step: worker", _clock("worker")), Fault("clock step: api", _clock("api"))]
    return found


def target(here: Site, rng: random.Random, name: str) -> Part:
    return rng.choice(here.workers) if name == "worker" else here.parts[name]


def _to_part(name: str, number: int) -> Act:
    def act(here: Site, rng: random.Random, short: bool) -> str:
        """Over when that process has ended: until then the old one may still answer."""
        part = target(here, rng, name)
        process = part.process
        if process is None or not part.signal(number):
            return ""
        deadline = time.monotonic() + SHUTDOWN + 30
        while part.process is process and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        return part.name

    return act


def _child(here: Site, rng: random.Random) -> int | None:
    """A job's process, waited for a while."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if children := [pid for worker in here.workers for pid in here.children(worker)]:
            return rng.choice(children)
        time.sleep(0.05)
    return None


def _send(pid: int, number: int) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def _to_child(number: int) -> Act:
    def act(here: Site, rng: random.Random, short: bool) -> str:
        pid = _child(here, rng)
        return f"pid {pid}" if pid is not None and _send(pid, number) else ""

    return act


@contextmanager
def _stopped(*pids: int) -> Iterator[None]:
    for pid in pids:
        _send(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            _send(pid, signal.SIGCONT)


def _stop_child(here: Site, rng: random.Random, short: bool) -> str:
    pid = _child(here, rng)
    if pid is None:
        return ""
    with _stopped(pid):
        time.sleep(TIMEOUT + rng.uniform(3, 6))
    return f"pid {pid}"


def _stop_worker(here: Site, rng: random.Random, short: bool) -> str:
    worker = target(here, rng, "worker")
    pid = worker.pid
    if pid is None:
        return ""
    with _stopped(pid):
        time.sleep(TIMEOUT + rng.uniform(3, 6))
    return worker.name


def _stop_both(here: Site, rng: random.Random, short: bool) -> str:
    """A host that freezes and comes back; first the child wakes, then its worker, or the other way round."""
    workers = [w for w in here.workers if here.children(w)] or here.workers
    worker = rng.choice(workers)
    pid = worker.pid
    if pid is None:
        return ""
    pids = [pid, *here.children(worker)]
    rng.shuffle(pids)
    with _stopped(*pids):
        time.sleep(TIMEOUT + rng.uniform(3, 6))
    return worker.name


def _wipe_queue(here: Site, rng: random.Random, short: bool) -> str:
    queue = here.parts["queue"]
    queue.held = True
    try:
        if not queue.signal(signal.SIGKILL):
            return ""
        while queue.pid is not None:
            time.sleep(0.02)
        subprocess.run(["rm", "-rf", *map(str, (here.root / "valkey").iterdir())], check=True)
    finally:
        queue.held = False
    return "queue"


def _away(rng: random.Random, short: bool) -> float:
    """A minute, though not every time."""
    return 6.0 if short else 60.0 if rng.random() < 0.3 else rng.uniform(5, 15)


def _hang_queue(here: Site, rng: random.Random, short: bool) -> str:
    """It takes connections and never answers."""
    pid = here.parts["queue"].pid
    if pid is None:
        return ""
    seconds = _away(rng, short)
    with _stopped(pid):
        time.sleep(seconds)
    return f"{seconds:.0f} s"


def _no_queue(here: Site, rng: random.Random, short: bool) -> str:
    """It refuses connections."""
    queue = here.parts["queue"]
    seconds = _away(rng, short)
    queue.held = True
    try:
        if not queue.signal(signal.SIGKILL):
            return ""
        time.sleep(seconds)
    finally:
        queue.held = False
    return f"{seconds:.0f} s"


def _full(name: str) -> Act:
    def act(here: Site, rng: random.Random, short: bool) -> str:
        """The file system is made as small as what is on it, and a file takes what is left."""
        folder = here.root / name
        filler = folder / ".filler"
        try:
            used = psutil.disk_usage(str(folder)).used // 1024
            subprocess.run(["mount", "-o", f"remount,size={used + 256}k", str(folder)], check=True, capture_output=True)
            _fill(filler)
            time.sleep(rng.uniform(2, 8))
        finally:
            filler.unlink(missing_ok=True)
            from benchmarks.faults.parts import DISK_MIB

            subprocess.run(["mount", "-o", f"remount,size={DISK_MIB}m", str(folder)], check=True)
        return name

    return act


def _fill(path: Path) -> None:
    with open(path, "wb", buffering=0) as file:
        for size in (65536, 4096, 512):
            try:
                while True:
                    file.write(b"\0" * size)
            except OSError:
                continue


def _clock(name: str) -> Act:
    def act(here: Site, rng: random.Random, short: bool) -> str:
        """An hour, forwards or back, for good: until the next step of the same clock."""
        part = target(here, rng, name)
        step = rng.choice([-3600, 3600, 0])
        path = here.clock(part.name)
        if path.read_text() == f"{step:+d}":
            step = 3600 if step <= 0 else -3600
        path.write_text(f"{step:+d}")
        time.sleep(rng.uniform(2, 4))
        return f"{part.name} {step:+d} s"

    return act
