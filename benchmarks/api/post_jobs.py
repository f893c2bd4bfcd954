#!/usr/bin/env python3
"""POST /v1/jobs at a fixed rate, on SQLite and on Postgres.

Open loop: requests start on a schedule, whether or not earlier ones were answered, and a latency counts from the
scheduled time, so waiting in a queue (the client's own too) is part of it. No worker runs. Aim: p99 under 50 ms at 100
requests a second.

Beside it two floors, to read the figures by: GET /healthz at the same rate (client, socket, HTTP) and a 4 KiB write
with fsync on the same disk (what any durable answer costs).
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import re
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks import common

AIM = 50.0  # ms


def spec(number: int) -> dict[str, Any]:
    """A spec such as clients send, its adapter's name its own."""
    return {
        "kind": "cpt",
        "adapter": f"bench-{number}",
        "model": {"name": "unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit"},
        "dataset": {
            "path": "wikimedia/wikipedia",
            "name": "20231101.ko",
            "template": {"prompt": "### 제목: {title}\n\n### 기사:\n{text}"},
        },
        "training": {"learning_rate": 5e-5, "num_train_epochs": 1, "seed": 3407},
    }


class Client:
    """HTTP/1.1 over kept-alive sockets, as many as there are requests under way.

    It takes 0.2 ms of processor time a request: a client with a connection pool takes ten times that, and on a machine
    of two cores would be much of what is measured.
    """

    def __init__(self, url: str) -> None:
        self.host, _, self.port = url.removeprefix("http://").partition(":")
        self.free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def send(self, method: str, path: str, body: bytes = b"", *, expect: int) -> bool:
        """Send a request, read the whole answer; whether its status is `expect`. Raises OSError, EOFError."""
        # The server closes a socket that was idle for some seconds.
        self.free = [pair for pair in self.free if not pair[0].at_eof()]
        reader, writer = self.free.pop() if self.free else await asyncio.open_connection(self.host, int(self.port))
        head = f"{method} {path} HTTP/1.1\r\nHost: {self.host}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        answer = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", answer, re.IGNORECASE)
        assert length is not None, answer
        await reader.readexactly(int(length[1]))
        self.free.append((reader, writer))
        if int(answer[9:12]) != expect:
            print(f"{method} {path}: {answer.decode()}", file=sys.stderr)
        return int(answer[9:12]) == expect


async def open_loop(
    rate: float, seconds: float, send: Callable[[int], Awaitable[bool]]
) -> tuple[list[float], int, float]:
    """Call `send` `rate` times a second for `seconds`; (latencies in seconds, errors, seconds until the last answer).

    `send` says whether it went well; a broken connection is an error too.
    """
    latencies: list[float] = []
    errors = 0

    async def one(number: int) -> None:
        nonlocal errors
        scheduled = start + number / rate
        await asyncio.sleep(scheduled - time.perf_counter())
        try:
            good = await send(number)
        except (OSError, EOFError) as error:
            print(f"request {number}: {error!r}", file=sys.stderr)
            good = False
        errors += not good
        latencies.append(time.perf_counter() - scheduled)

    gc.collect()
    gc.disable()  # a collection here would look like a slow answer
    start = time.perf_counter() + 0.1
    await asyncio.gather(*(one(n) for n in range(round(rate * seconds))))
    gc.enable()
    return latencies, errors, time.perf_counter() - start


async def measure(url: str, rate: float, seconds: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures of GET /healthz and of POST /v1/jobs."""
    http = Client(url)

    async def health(_: int) -> bool:
        return await http.send("GET", "/healthz", expect=200)

    async def post(number: int) -> bool:
        return await http.send("POST", "/v1/jobs", json.dumps(spec(number)).encode(), expect=202)

    await open_loop(rate, 1, health)  # connections opened, code paths touched
    floor, _, _ = await open_loop(rate, min(seconds, 5), health)
    for number in range(20):
        await post(1_000_000 + number)
    latencies, errors, took = await open_loop(rate, seconds, post)
    figures = {**common.milliseconds(latencies, 50, 95, 99), "errors": errors}
    return common.milliseconds(floor, 50, 99), {**figures, "answered_per_s": round(len(latencies) / took, 1)}


def fsync_times(where: Path, number: int = 200) -> list[float]:
    """Seconds of appending 4 KiB and syncing."""
    out = []
    with open(where / "fsync", "wb", buffering=0) as file:
        for _ in range(number):
            began = time.perf_counter()
            file.write(b"x" * 4096)
            os.fsync(file.fileno())
            out.append(time.perf_counter() - began)
    return out


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--rate", type=float, default=100, metavar="R", help="requests a second (default: 100)")
    parser.add_argument("--seconds", type=float, default=30, metavar="S", help="length of the load (default: 30)")
    parser.add_argument("--database", choices=common.DATABASES, action="append", help="default: both")
    arguments = parser.parse_args()
    kinds = arguments.database or common.DATABASES
    report = common.Report("api/post_jobs", common.wait_until_calm(arguments.calm))
    p99 = {}
    for kind in kinds:
        with (
            common.folder() as where,
            common.database(kind, where) as database_url,
            common.queue_server(where) as redis_url,
            common.api(where, database_url, redis_url) as url,
        ):
            about = {"database": kind, "rate_per_s": arguments.rate, "seconds": arguments.seconds}
            disk = common.milliseconds(fsync_times(where), 50, 99)
            floor, figures = asyncio.run(measure(url, arguments.rate, arguments.seconds))
            report.add_all(disk, call="fsync of 4 KiB", **about)
            report.add_all(floor, call="GET /healthz", **about)
            aims = {"p99_ms": AIM} if arguments.rate == 100 else {}
            report.add_all(figures, aims={**aims, "errors": 1}, call="POST /v1/jobs", **about)
            p99[kind] = figures["p99_ms"]
    if len(p99) == 2:
        about = {"database": "both", "rate_per_s": arguments.rate, "seconds": arguments.seconds}
        ratio = round(p99["postgres"] / p99["sqlite"], 3)
        report.add("p99 postgres / sqlite", ratio, call="POST /v1/jobs", **about)
    report.show()


if __name__ == "__main__":
    main()
