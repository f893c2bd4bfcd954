"""Processes under load: started with a base of their own, watched through /proc."""

from __future__ import annotations

import asyncio
import os
import re
import resource
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks import common

MIB = 1024 * 1024
_TICK = os.sysconf("SC_CLK_TCK")


@dataclass
class Watched:
    """A served process."""

    url: str
    pid: int
    marked: tuple[float, float] = (0.0, 0.0)

    def mark(self) -> None:
        """From now on `spent` and `grown` count."""
        self.marked = (self.cpu(), self.memory())
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")  # the peak begins anew

    def spent(self) -> float:
        """Processor time, seconds."""
        return self.cpu() - self.marked[0]

    def grown(self) -> float:
        """Peak of the memory over what it was, MiB."""
        return round(self.memory(peak=True) - self.marked[1], 1)

    def cpu(self) -> float:
        """Processor time so far, seconds."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICK

    def memory(self, *, peak: bool = False) -> float:
        """Resident memory in MiB, or its highest value since `mark`."""
        name = "VmHWM" if peak else "VmRSS"
        found = re.search(rf"{name}:\s+(\d+) kB", Path(f"/proc/{self.pid}/status").read_text())
        assert found is not None
        return int(found[1]) / 1024

    def metric(self, name: str) -> float:
        """A value of /metrics."""
        text = httpx.get(f"{self.url}/metrics", timeout=60, trust_env=False).text
        return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name))


@contextmanager
def process(where: Path, name: str, health: str, **lorry_variables: str) -> Iterator[Watched]:
    """`lorry api` or `lorry engine`, once it answers."""
    port = common.free_port()
    variables = {"engine_port" if name == "engine" else "port": str(port), **lorry_variables}
    url = f"http://127.0.0.1:{port}"
    log = where / f"{name}.log"
    with open(log, "ab") as file:
        started = subprocess.Popen(
            common.lorry(name), env=common.environment(where, **variables), stdout=file, stderr=file
        )
    try:
        common.wait_for(f"{url}{health}", started, log)
        yield Watched(url, started.pid)
    finally:
        started.terminate()
        started.wait(60)
        if text := log.read_text():
            print(text[-4000:], file=sys.stderr)


@contextmanager
def api(where: Path, database_url: str, redis_url: str, **lorry_variables: str) -> Iterator[Watched]:
    lorry_variables.setdefault("access_log", "0")
    with process(
        where, "api", "/healthz", database_url=database_url, redis_url=redis_url, **lorry_variables
    ) as watched:
        yield watched


@contextmanager
def engine(where: Path, base: Path, **lorry_variables: str) -> Iterator[Watched]:
    lorry_variables = {
        "base_model": str(base), "torch_threads": "1", "engine_max_seq_length": "256", "access_log": "0",
        **lorry_variables,
    }  # fmt: skip
    with process(where, "engine", "/health", **lorry_variables) as watched:
        yield watched


def tiny_base(where: Path) -> Path:
    """A random Llama of 0.2 M parameters: its steps cost little, so that the rest shows."""
    folder = where / "tiny"
    code = "import sys; from tests.tiny import make_tiny_base; make_tiny_base(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(folder)], env=common.environment(where), check=True)
    return folder


def many_files() -> None:
    """Let this process open as many sockets as the machine allows."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@dataclass
class Connection:
    """One HTTP/1.1 request on a socket of its own, its body read as it comes; chunk sizes stay in it."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    status: int = 0
    head: str = ""

    @classmethod
    async def open(cls, url: str, method: str, path: str, body: bytes = b"", **headers: str) -> Connection:
        """Send a request. The head of the answer is read by `begin`."""
        host, _, port = url.removeprefix("http://").partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", "Connection: close", f"Content-Length: {len(body)}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        writer.write("\r\n".join([*lines, "", ""]).encode() + body)
        return cls(reader, writer)

    async def begin(self) -> int:
        """The answer's status. Raises OSError, EOFError."""
        self.head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        self.status = int(self.head[9:12])
        return self.status

    async def pieces(self) -> AsyncIterator[bytes]:
        """What comes, until the server's end."""
        while piece := await self.reader.read(65536):
            yield piece

    def close(self) -> None:
        self.writer.transport.abort()
