"""10,000 queued jobs, each made by a POST."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

from benchmarks import common
from benchmarks.api.list_jobs import time_list
from benchmarks.api.post_jobs import Client, spec
from benchmarks.load import parts
from service.db import Database
from service.jobs import repository
from service.queue import JobQueue
from service.reconcile import reconcile
from service.settings import Settings

CLIENTS = 8


async def post(url: str, number: int) -> tuple[float, int, list[float]]:
    """POST that many jobs from CLIENTS connections, one after the other on each; (seconds, errors, latencies)."""
    http = Client(url)
    numbers = iter(range(number))
    latencies: list[float] = []
    errors = 0

    async def one() -> None:
        nonlocal errors
        for n in numbers:
            began = time.perf_counter()
            errors += not await http.send("POST", "/v1/jobs", json.dumps(spec(n)).encode(), expect=202)
            latencies.append(time.perf_counter() - began)

    began = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(CLIENTS)))
    return time.perf_counter() - began, errors, latencies


async def cancel(url: str, ids: list[str]) -> tuple[int, list[float]]:
    http = Client(url)
    latencies = []
    errors = 0
    for job_id in ids:
        began = time.perf_counter()
        errors += not await http.send("POST", f"/v1/jobs/{job_id}/cancel", expect=200)
        latencies.append(time.perf_counter() - began)
    return errors, latencies


def measure(report: common.Report, number: int = 10_000) -> None:
    for kind in common.DATABASES:
        with (
            common.folder() as where,
            common.database(kind, where) as database_url,
            common.queue_server(where) as redis_url,
            parts.api(where, database_url, redis_url) as api,
        ):
            case = {"part": "jobs", "case": f"{number} queued on {kind}"}
            asyncio.run(post(api.url, 0))
            api.mark()
            seconds, errors, latencies = asyncio.run(post(api.url, number))
            report.add("POST errors", errors, aim="= 0", met=errors == 0, **case)
            report.add("POST a second", round(number / seconds, 1), **case)
            report.add("POST processor time, ms", round(1000 * api.spent() / number, 2), **case)
            report.add_all({f"POST {k}": v for k, v in common.milliseconds(latencies, 50, 99).items()}, **case)
            report.add("API memory growth, MiB", api.grown(), aim="< 64", met=api.grown() < 64, **case)
            db, queue = Database(database_url), JobQueue(redis_url, "lorry")
            with db.read() as session:
                ids = repository.ready_to_run(session)
            queued = len(queue.waiting() & set(ids))
            report.add("on the queue", queued, aim=f"= {number}", met=queued == number, **case)
            deep = [{"after": ids[n * len(ids) // 10]} for n in range(1, 10)]
            times = time_list(api.url, {"list": [{}], "list, deep": deep}, 200)
            for name, seconds_each in times.items():
                figures = {f"{name} {k}": v for k, v in common.milliseconds(seconds_each, 50, 99).items()}
                report.add_all(figures, aims={f"{name} p99_ms": 100}, **case)
            errors, latencies = asyncio.run(cancel(api.url, ids[:: max(1, number // 100)]))
            report.add("cancel errors", errors, aim="= 0", met=errors == 0, **case)
            report.add_all({f"cancel {k}": v for k, v in common.milliseconds(latencies, 50, 99).items()}, **case)
            report.add_all(passes(where, db, queue, database_url, redis_url), **case)
            db.dispose()


def passes(where: Path, db: Database, queue: JobQueue, database_url: str, redis_url: str) -> dict[str, float]:
    """reconcile() with nothing to do."""
    settings = Settings(data_dir=where / "data", database_url=database_url, redis_url=redis_url)
    took, cpu = [], time.process_time()
    for _ in range(5):
        began = time.perf_counter()
        reconcile(db, queue, settings)
        took.append(time.perf_counter() - began)
    cpu = (time.process_time() - cpu) / 5
    return {
        "reconcile, a pass p50_ms": common.milliseconds(took, 50)["p50_ms"],
        "reconcile, processor ms": round(1000 * cpu, 1),
    }
