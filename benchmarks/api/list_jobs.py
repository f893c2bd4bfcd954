#!/usr/bin/env python3
"""GET /v1/jobs among 10,000 jobs: each filter, first page and deep ones; and what reconcile() costs with 10,000 queued.

Jobs are put into SQL in bulk, in the shares of a service that has been used for a while. One client asks for pages of
20 (and once of 100) in turn, over a socket; the API's own reconcile() runs as it always does. Aim: p99 under 100 ms.

reconcile() runs every 5 s in the API and in each worker, so its pass is timed too, on a database in which all 10,000
jobs are queued: the first pass, which puts them on an empty queue, and later ones, which find nothing to do. The same
database is then listed through the API, whose process runs those passes.
"""

from __future__ import annotations

import random
import sys
import time
from itertools import cycle
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import insert, text

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks import common
from service.db import Database
from service.jobs import repository
from service.models import AdapterRow, JobRow
from service.queue import JobQueue
from service.reconcile import reconcile
from service.settings import Settings
from service.specs import parse_spec

AIM = 100.0  # ms
KINDS = {"cpt": 30, "ift": 50, "export": 20}
STATUS = {"succeeded": 700, "failed": 120, "cancelled": 60, "queued": 100, "paused": 15, "running": 4, "preparing": 1}
TEMPLATES = {
    "cpt": {"prompt": "### 제목: {title}\n\n### 기사:\n{text}"},
    "ift": {"chat_template": "llama-3.1", "system": "You are a helpful assistant."},
}
MODEL = "unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit"


def make_jobs(number: int, status: dict[str, int]) -> list[dict[str, Any]]:
    """Rows of the jobs table as a service leaves them, oldest first; ids sort by creation as the service's own do."""
    rnd = random.Random(0)
    start = time.time() - 90 * 86400
    rows = []
    for n in range(number):
        kind = rnd.choices(list(KINDS), list(KINDS.values()))[0]
        state = rnd.choices(list(status), list(status.values()))[0]
        created = start + n * 90 * 86400 / number
        body: dict[str, Any] = {"kind": kind, "adapter": f"adapter-{n}"}
        if kind != "export":
            body |= {"model": {"name": MODEL}, "dataset": {"path": "org/set", "template": TEMPLATES[kind]}}
        done = state in ("succeeded", "failed", "cancelled")
        live = state in ("running", "preparing")
        steps = {"step": 1000, "total_steps": 1000, "epoch": 1.0, "tokens": 16_384_000, "tokens_per_second": 9871.0}
        result = {"eval_loss_start": 2.4, "eval_loss": 1.9, "train_loss": 1.8, "steps_trained": 1000}
        rows.append(
            {
                "id": f"job_{int(created * 1000):012x}{rnd.randrange(16**12):012x}",
                "kind": kind,
                "status": state,
                "adapter": body["adapter"],
                "attempt": 1,
                "spec": parse_spec(body).model_dump(mode="json"),
                "after": [],
                "run_id": f"run_{n}" if live else None,
                "heartbeat_at": time.time() if live else None,
                "event_seq": 4,
                "progress": {**steps, "eta_seconds": 0.0, "phase": "done"} if done or live else {},
                "result": result if state == "succeeded" else {},
                "error": {"code": "invalid_data", "message": "row 7: no column 'text'"} if state == "failed" else None,
                "lineage": {"base": MODEL, "parent": None, "jobs": []},
                "created_at": created,
                "started_at": created + 5 if done or live else None,
                "finished_at": created + 3600 if done else None,
            }
        )
    return rows


def fill(db: Database, rows: list[dict[str, Any]]) -> None:
    """Insert the jobs and their adapters, and give Postgres the statistics that its autovacuum would gather."""
    names = [
        {"name": r["adapter"], "job_id": r["id"], "kind": r["kind"], "base": MODEL, "created_at": r["created_at"]}
        for r in rows
        if r["kind"] != "export" and r["status"] not in ("failed", "cancelled")
    ]
    with db.write() as session:
        for at in range(0, len(rows), 1000):
            session.execute(insert(JobRow), rows[at : at + 1000])
        for at in range(0, len(names), 1000):
            session.execute(insert(AdapterRow), names[at : at + 1000])
    if not db.sqlite:
        with db.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("ANALYZE"))


def queries(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, str]]]:
    """Parameters of GET /v1/jobs by name of the case; a case's calls are made in turn."""
    ids = [r["id"] for r in rows]
    out: dict[str, list[dict[str, str]]] = {"no filter": [{}], "limit=100": [{"limit": "100"}]}
    out["no filter, deep"] = [{"after": ids[n * len(ids) // 20]} for n in range(1, 20)]
    out["kind"] = [{"kind": k} for k in KINDS]
    out["status"] = [{"status": s} for s in STATUS]
    both = [{"kind": k, "status": s} for k in KINDS for s in STATUS]
    out["kind and status"] = both
    out["kind, deep"] = [{"kind": k, "after": ids[n * len(ids) // 10]} for k in KINDS for n in range(1, 10)]
    out["status, deep"] = [{"status": s, "after": ids[n * len(ids) // 10]} for s in STATUS for n in range(1, 10)]
    out["kind and status, deep"] = [{**q, "after": ids[len(ids) // 10]} for q in both]
    return out


def time_list(url: str, cases: dict[str, list[dict[str, str]]], calls: int) -> dict[str, list[float]]:
    """Seconds of each call, by case."""
    out: dict[str, list[float]] = {}
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as http:
        for name, variants in cases.items():
            out[name] = []
            for parameters, _ in zip(cycle(variants), range(-len(variants), calls), strict=False):
                began = time.perf_counter()
                answer = http.get("/v1/jobs", params=parameters)
                took = time.perf_counter() - began
                assert answer.status_code == 200, answer.text
                if _ >= 0:  # each variant once to warm up
                    out[name].append(took)
    return out


def wait_for_queue(db: Database, queue: JobQueue) -> None:
    """Until reconcile() has put all queued jobs on the queue, at most a minute."""
    with db.read() as session:
        ready = set(repository.ready_to_run(session))
    deadline = time.monotonic() + 60
    while ready - queue.waiting() and time.monotonic() < deadline:
        time.sleep(0.2)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--jobs", type=int, default=10_000, metavar="N", help="jobs in SQL (default: 10,000)")
    parser.add_argument("--calls", type=int, default=300, metavar="N", help="timed calls a case (default: 300)")
    parser.add_argument("--database", choices=common.DATABASES, action="append", help="default: both")
    arguments = parser.parse_args()
    report = common.Report("api/list_jobs", common.wait_until_calm(arguments.calm))
    for kind in arguments.database or common.DATABASES:
        about = {"database": kind, "jobs": arguments.jobs}
        with (
            common.folder() as where,
            common.database(kind, where) as database_url,
            common.queue_server(where) as redis_url,
        ):
            db, queue = Database(database_url), JobQueue(redis_url, "lorry")
            rows = make_jobs(arguments.jobs, STATUS)
            fill(db, rows)
            with common.api(where, database_url, redis_url, heartbeat_timeout_seconds="86400") as url:
                wait_for_queue(db, queue)
                for case, seconds in time_list(url, queries(rows), arguments.calls).items():
                    figures = common.milliseconds(seconds, 50, 99)
                    report.add_all(figures, aims={"p99_ms": AIM}, case=case, **about)
            db.dispose()
        with (
            common.folder() as where,
            common.database(kind, where) as database_url,
            common.queue_server(where) as redis_url,
        ):
            db, queue = Database(database_url), JobQueue(redis_url, "lorry")
            settings = Settings(data_dir=where / "data", database_url=database_url, redis_url=redis_url)
            rows = make_jobs(arguments.jobs, {"queued": 1})
            fill(db, rows)
            began = time.perf_counter()
            done = reconcile(db, queue, settings)
            report.add("first_s", round(time.perf_counter() - began, 2), case="reconcile, all queued", **about)
            assert len(done.enqueued) == arguments.jobs
            passes, cpu = [], time.process_time()
            for _ in range(10):
                began = time.perf_counter()
                assert not reconcile(db, queue, settings).enqueued
                passes.append(time.perf_counter() - began)
            cpu = (time.process_time() - cpu) / 10
            report.add_all(common.milliseconds(passes, 50), case="reconcile, all queued", **about)
            report.add("cpu_ms", round(1000 * cpu, 1), case="reconcile, all queued", **about)
            with common.api(where, database_url, redis_url, heartbeat_timeout_seconds="86400") as url:
                for case, seconds in time_list(url, {"no filter, all queued": [{}]}, 10 * arguments.calls).items():
                    figures = common.milliseconds(seconds, 50, 99)
                    report.add_all(figures, aims={"p99_ms": AIM}, case=case, **about)
            db.dispose()
    report.show()


if __name__ == "__main__":
    main()
