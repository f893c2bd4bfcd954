"""500 streams of POST /generate at once, through API and engine, on a tiny model."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import common
from benchmarks.load import parts

SECONDS = 300.0  # a client still waiting then is stuck


@dataclass
class Outcome:
    """What the clients saw; times in seconds since a client's first try."""

    finished: int = 0
    errors: int = 0
    stuck: int = 0
    refused: int = 0  # answers 503
    blunt: int = 0  # of these, without Retry-After
    tokens: int = 0
    first: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)
    seconds: float = 0.0


async def one(url: str, number: int, new_tokens: int, out: Outcome) -> None:
    body = json.dumps({"prompt": f"def f{number}(", "max_new_tokens": new_tokens, "stream": True}).encode()
    jitter = random.Random(number)
    began = time.perf_counter()
    while True:
        connection = await parts.Connection.open(url, "POST", "/generate", body, Content_Type="application/json")
        try:
            status = await connection.begin()
            if status == 503:
                out.refused += 1
                again = re.search(r"retry-after: (\d+)", connection.head, re.IGNORECASE)
                out.blunt += again is None
                await asyncio.sleep((int(again[1]) if again else 1) * jitter.uniform(0.5, 1.5))
                continue
            end = b""
            async for piece in connection.pieces():
                if not end:
                    out.first.append(time.perf_counter() - began)
                end = (end + piece)[-8192:]
        finally:
            connection.close()
        break
    done = re.search(rb"event: done\ndata: (.*?)\n", end)
    if status != 200 or done is None:
        out.errors += 1
        return
    out.finished += 1
    out.tokens += json.loads(done[1])["usage"]["completion_tokens"]
    out.total.append(time.perf_counter() - began)


async def all_at_once(url: str, clients: int, new_tokens: int) -> Outcome:
    out = Outcome()
    began = time.perf_counter()
    tasks = [asyncio.create_task(one(url, n, new_tokens, out)) for n in range(clients)]
    done, waiting = await asyncio.wait(tasks, timeout=SECONDS)
    out.stuck = len(waiting)
    for task in waiting:
        task.cancel()
    out.errors += sum(task.exception() is not None for task in done)
    out.seconds = time.perf_counter() - began
    return out


@contextmanager
def stack(where: Path, base: Path, **engine_limits: str) -> Iterator[tuple[parts.Watched, parts.Watched]]:
    """API and engine."""
    with (
        common.database("sqlite", where) as database_url,
        common.queue_server(where) as redis_url,
        parts.engine(where, base, **engine_limits) as engine,
        parts.api(where, database_url, redis_url, engine_url=engine.url, base_model=str(base)) as api,
    ):
        yield api, engine


def measure(report: common.Report, clients: int = 500, new_tokens: int = 64) -> None:
    places = {"engine_max_batch": "64", "engine_max_queue": str(max(1, clients - 64))}
    for about, limits in (("a place for each", places), ("16 run, 64 wait", {})):
        with common.folder() as where:
            base = parts.tiny_base(where)
            with stack(where, base, **limits) as (api, engine):
                asyncio.run(all_at_once(api.url, 8, 8))  # code paths touched
                api.mark()
                engine.mark()
                out = asyncio.run(all_at_once(api.url, clients, new_tokens))
                case = {"part": "streams", "case": f"{clients} clients, {about}"}
                report.add("finished", out.finished, aim=f"= {clients}", met=out.finished == clients, **case)
                report.add("stuck", out.stuck, aim="= 0", met=out.stuck == 0, **case)
                report.add("errors", out.errors, aim="= 0", met=out.errors == 0, **case)
                report.add("answers 503", out.refused, **case)
                report.add("503 without Retry-After", out.blunt, aim="= 0", met=out.blunt == 0, **case)
                report.add_all(
                    {f"first event {k}": v for k, v in common.milliseconds(out.first, 50, 99).items()}, **case
                )
                report.add_all({f"answer {k}": v for k, v in common.milliseconds(out.total, 50, 99).items()}, **case)
                report.add("tokens_per_s", round(out.tokens / out.seconds, 1), **case)
                for name, p in (("API", api), ("engine", engine)):
                    spent = 1e6 * p.spent() / max(1, out.tokens)
                    report.add(f"{name} processor time a token, us", round(spent, 1), **case)
                    report.add(f"{name} memory growth, MiB", p.grown(), aim="< 128", met=p.grown() < 128, **case)
                left = engine.metric("lorry_engine_running") + engine.metric("lorry_engine_waiting")
                report.add("left in the engine", int(left), aim="= 0", met=left == 0, **case)
