"""1,000 followers of one job on one API process."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

import httpx

from benchmarks import common
from benchmarks.api.post_jobs import spec
from benchmarks.load import parts
from service.db import Database
from service.ids import new_id
from service.jobs import repository

RATE, SECONDS = 10, 10  # events a second, for so long; half of a window of them is there before anyone follows
POLLS_PER_SECOND = 1 / 0.3  # what the poller asks at most


@dataclass
class Follower:
    seen: list[int] = field(default_factory=list)
    at: list[float] = field(default_factory=list)  # arrival of each, monotonic seconds
    connected: float = 0.0
    ended: bool = False
    rest: bytes = b""

    async def follow(self, url: str, job_id: str) -> None:
        began = time.monotonic()
        connection = await parts.Connection.open(url, "GET", f"/v1/jobs/{job_id}/events")
        try:
            assert await connection.begin() == 200
            async for piece in connection.pieces():
                now = time.monotonic()
                self.connected = self.connected or now - began
                *lines, self.rest = (self.rest + piece).split(b"\n")
                for line in lines:
                    if line.startswith(b"id: "):
                        self.seen.append(int(line[4:]))
                        self.at.append(now)
                    elif b'"status":"succeeded"' in line:
                        self.ended = True
        finally:
            connection.close()


def make_running_job(db: Database, url: str, number: int = 0) -> tuple[str, str]:
    """(job, run): a job as a worker has it, without a worker."""
    job_id = httpx.post(f"{url}/v1/jobs", json=spec(number), trust_env=False).json()["id"]
    run_id = new_id("run")
    with db.write() as session:
        assert repository.claim(session, job_id, run_id, "benchmark") is not None
        assert repository.transition(session, job_id, ["preparing"], "running", run_id=run_id)
    return job_id, run_id


def add_event(db: Database, job_id: str, run_id: str, number: int) -> tuple[int, float]:
    """An event such as training writes, and a heartbeat; (seq, when it was there)."""
    point = {"split": "train", "step": number, "epoch": 0.1, "loss": 2.31, "learning_rate": 5e-5, "grad_norm": 0.8}
    with db.write() as session:
        repository.own(session, job_id, run_id)
        seq = repository.add_event(session, job_id, "metrics", point)
    return seq, time.monotonic()


async def run(url: str, db: Database, followers: int) -> tuple[list[Follower], dict[int, float]]:
    """(followers, when each event was there)."""
    job_id, run_id = await asyncio.to_thread(make_running_job, db, url)
    for number in range(RATE * 5):
        add_event(db, job_id, run_id, number)
    crowd = [Follower() for _ in range(followers)]
    tasks = [asyncio.create_task(f.follow(url, job_id)) for f in crowd]
    deadline = time.monotonic() + 120
    while not all(f.seen for f in crowd) and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
    written: dict[int, float] = {}
    began = time.monotonic()
    for number in range(RATE * SECONDS):
        await asyncio.sleep(max(0.0, began + number / RATE - time.monotonic()))
        seq, at = await asyncio.to_thread(add_event, db, job_id, run_id, 1000 + number)
        written[seq] = at
    with db.write() as session:
        assert repository.transition(session, job_id, ["running"], "succeeded", run_id=run_id)
    await asyncio.wait(tasks, timeout=120)
    return crowd, written


def measure(report: common.Report, followers: int = 1000) -> None:
    for kind in common.DATABASES:
        with (
            common.folder() as where,
            common.database(kind, where) as database_url,
            common.queue_server(where) as redis_url,
            parts.api(where, database_url, redis_url, heartbeat_timeout_seconds="600") as api,
        ):
            db = Database(database_url)
            polls, reads = api.metric("lorry_event_polls_total"), api.metric("lorry_event_reads_total")
            api.mark()
            began = time.monotonic()
            crowd, written = asyncio.run(run(api.url, db, followers))
            seconds = time.monotonic() - began
            polls, reads = api.metric("lorry_event_polls_total") - polls, api.metric("lorry_event_reads_total") - reads
            db.dispose()
            last = max(written) + 1
            whole = sum(f.ended and f.seen == list(range(1, last + 1)) for f in crowd)
            late = [at - written[n] for f in crowd for n, at in zip(f.seen, f.at, strict=True) if n in written]
            case = {"part": "followers", "case": f"{followers} on {kind}, {RATE} events/s"}
            report.add(
                "followers with every event once, in order", whole, aim=f"= {followers}", met=whole == followers, **case
            )
            rate = round(polls / seconds, 2)
            report.add("polls a second", rate, aim=f"<= {POLLS_PER_SECOND:.2f}", met=rate <= POLLS_PER_SECOND, **case)
            report.add("reads of a page, in all", int(reads), aim=f"< {followers}", met=reads < followers, **case)
            connected = common.milliseconds([f.connected for f in crowd], 50, 99)
            report.add_all({f"connected {k}": v for k, v in connected.items()}, **case)
            delays = {f"event to client {k}": v for k, v in common.milliseconds(late, 50, 99).items()}
            report.add_all(delays, aims={"event to client p99_ms": 2000}, **case)
            sent = sum(len(f.seen) for f in crowd)
            report.add("API processor time an event and follower, us", round(1e6 * api.spent() / sent, 1), **case)
            report.add("API processor time, share of a core", round(api.spent() / seconds, 2), **case)
            report.add("API memory growth, MiB", api.grown(), aim="< 128", met=api.grown() < 128, **case)
