"""Faults of every kind while jobs and generations run on real parts; then a count of what was lost. Exit code 1 if
anything was.

    python -m benchmarks.faults.run --rounds 200 --database postgres
    python -m benchmarks.faults.run --minutes 4 --seed 3
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx

from benchmarks import common
from benchmarks.faults import checks, parts
from benchmarks.faults.inject import Fault, faults
from benchmarks.faults.load import FINAL, PROMPT, Client, Follower, Generator, Ledger, Sent, start
from benchmarks.faults.parts import ALL_PARTS, RECONCILE, Site
from benchmarks.faults.watch import Watcher
from service.jobs import repository
from tests.recipes import texts

READY_SECONDS, QUIET_SECONDS = 120.0, 900.0
LEAST = 6  # rounds, however slow the machine is
BACKLOG = 5  # unfinished jobs kept there for two workers


@dataclass
class Rounds:
    """What was done and how long the parts took to answer again."""

    done: Counter[str] = field(default_factory=Counter)
    without_target: Counter[str] = field(default_factory=Counter)
    recovery: dict[str, list[float]] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)


def main() -> None:
    """Parse, run, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--database", choices=common.DATABASES, default="sqlite")
    parser.add_argument("--rounds", type=int, default=200, help="faults to inject (default: 200)")
    parser.add_argument(
        "--minutes", type=float, default=None, help="the last fault after this long; outages are kept short"
    )
    parser.add_argument(
        "--at-most", type=float, default=None, help="minutes until the last fault, outages as long as ever"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--preload", action="store_true", help="workers import torch before they fork: more trainings, fewer imports"
    )
    parser.add_argument("--only", default="", help="only faults whose names contain this")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through the finally blocks: nothing is left running
    minutes, short = arguments.minutes or arguments.at_most, arguments.minutes is not None
    report = run(
        arguments.database,
        arguments.rounds,
        minutes,
        arguments.seed,
        arguments.only,
        short=short,
        preload=arguments.preload,
    )
    show(report)
    sys.exit(1 if report["lost"] else 0)


def run(
    database: str, rounds: int, minutes: float | None, seed: int, only: str = "", *, short: bool = True,
    preload: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Everything from the undisturbed reference to the last check; the report, with `lost` as the number of findings."""
    began = time.monotonic()
    until = began + 60 * minutes if minutes else float("inf")
    rng = random.Random(seed)
    with parts.site(database, preload=preload) as here:
        db = here.database()
        ledger, stop = Ledger(), threading.Event()
        client = Client(here, ledger, upload(here), seed)
        reference, known = undisturbed(here, client)
        say(f"reference after {time.monotonic() - began:.0f} s; faults: {', '.join(f.name for f in faults(here))}")
        watcher = Watcher(here)
        start(watcher.run, stop)
        more = threading.Event()  # set when no more jobs are to be posted
        submitter = start(client.submit, more, BACKLOG if not short else 3)
        asking = [
            start(Generator(here, ledger, seed + 1, known).run, stop),
            start(Follower(here, ledger).run, stop),
        ]
        chosen = [f for f in faults(here) if only in f.name]
        result = inject(here, ledger, watcher, chosen, rng, rounds, until, short=short)
        more.set()
        submitter.join()
        if here.ready(READY_SECONDS, ALL_PARTS) is None:
            result.lines.append("in the end: NOT READY again")
        quiet = wait_for_quiet(here, ledger)
        stop.set()
        for thread in asking:
            thread.join(70)
        time.sleep(8 * RECONCILE)  # a last look at the disk
        took = here.stop()
        watcher.sample()  # all are dead: what trained beside its successor to the end is told now
        orphans = [f"process {pid} was left" for pid in parts.tagged(here.tag)]
        if database == "postgres":
            here.parts["postgres"].start()  # the checks read it
            parts._wait_for_postgres(here.database_url)
        found = checks.run_all(db, here, ledger, reference, watcher.overlaps)
        found["no process left"] = orphans + [f"{n} did not stop in time" for n, s in took.items() if s == float("inf")]
        found["ready again after each fault"] = [x for x in result.lines if "NOT READY" in x]
        found["quiet in the end"] = quiet
        report = {
            "benchmark": "faults", "database": database, "seed": seed, "preload": preload, "rounds": sum(result.done.values()),
            "minutes": round((time.monotonic() - began) / 60, 1), "faults": dict(result.done),
            "without_target": dict(result.without_target),
            "slowest_recovery_s": {k: round(max(v), 1) for k, v in result.recovery.items() if v},
            **checks.figures(db), "trainings": watcher.trainings, "posts": len(ledger.sent),
            "answers": dict(ledger.answers), "stop_s": took, "found": {k: v[:20] for k, v in found.items()},
            "lost": sum(map(len, found.values())), **common.machine(),
        }  # fmt: skip
        if report["lost"]:
            print(parts.logs(here, 6000), file=sys.stderr)
        db.dispose()
        return report


def upload(here: Site) -> str:
    path = texts(here.root / "rows.jsonl", n=80)
    with open(path, "rb") as file:
        answer = here.http.post(f"{here.url}/v1/files", files={"file": file}, data={"purpose": "fine-tune"})
    answer.raise_for_status()
    file_id: str = answer.json()["id"]
    return file_id


def undisturbed(here: Site, client: Client) -> tuple[dict[str, Any], dict[str | None, str]]:
    """Run one job of each role alone: what they come to, and what base and adapters answer."""
    db = here.database()
    for n in range(1, 4):
        name, first = f"ref{n}", len(client.ledger.sent)
        client.chain(name, ["cpt", "ift", "export-lora", "export-merged_16bit"])
        sent = client.ledger.sent[first:]
        wait_until_final(here, sent)
        with db.read() as session:
            runs = [len(repository.runs(session, s.job_id or "")) for s in sent]
        if runs == [1, 1, 1, 1]:
            break
        say(f"{name} was disturbed, by a machine too busy for its heartbeats: {runs} runs")
    else:
        raise SystemExit("no undisturbed reference:\n" + parts.logs(here))
    reference = {s.role: checks.outcome(db, here, s.job_id or "") for s in sent}
    db.dispose()
    if not all(r["weights"] for r in reference.values()):
        raise SystemExit("the undisturbed jobs failed:\n" + parts.logs(here))
    known: dict[str | None, str] = {}
    for adapter in (None, name, f"{name}-chat"):
        body = {"adapter": adapter, "prompt": PROMPT, "max_new_tokens": 48, "temperature": 0}
        answer = here.http.post(f"{here.url}/generate", json=body, timeout=60)
        answer.raise_for_status()
        known[adapter] = answer.json()["text"]
    return reference, known


def wait_until_final(here: Site, jobs: list[Sent], seconds: float = 1200) -> None:
    """Raises SystemExit if they do not end."""
    deadline = time.monotonic() + seconds
    for sent in jobs:
        while status_of(here, sent) not in FINAL:
            if time.monotonic() > deadline:
                raise SystemExit("the undisturbed jobs did not end:\n" + parts.logs(here))
            time.sleep(1)


def status_of(here: Site, sent: Sent) -> str:
    """The job's state, or "" while the API does not say."""
    try:
        status: str = here.http.get(f"{here.url}/v1/jobs/{sent.job_id}").json()["status"]
    except (httpx.HTTPError, ValueError, KeyError):
        return ""
    return status


def inject(
    here: Site, ledger: Ledger, watcher: Watcher, chosen: list[Fault], rng: random.Random, rounds: int, until: float,
    *, short: bool,
) -> Rounds:  # fmt: skip
    """Round by round: a fault at a random moment, then until API, database and queue answer again.

    The engine, which loads its model first, is waited for only before it is the next to be broken.
    """
    result = Rounds()
    order: list[Fault] = []
    while (done := sum(result.done.values())) < rounds and (done < LEAST or time.monotonic() < until):
        if not order:  # every fault once before any comes again
            order = rng.sample(chosen, len(chosen))
        fault = order.pop()
        time.sleep(rng.uniform(0.5, 3))
        moment = "any time"
        if "engine" in fault.breaks and here.ready(READY_SECONDS, ALL_PARTS) is None:
            result.lines.append(f"before {fault.name}: the engine is NOT READY again")
        if rng.random() < 0.6 and wait_for_training(watcher, 10):
            moment = "while training"
            time.sleep(rng.uniform(0, 2))
        began = time.monotonic()
        ledger.broken = fault.breaks
        did = fault.act(here, rng, short)
        ended = time.monotonic()
        ready = here.ready(READY_SECONDS)
        ledger.recent, ledger.broken_until, ledger.broken = fault.breaks, time.monotonic() + 3, frozenset()
        if not did:
            result.without_target[fault.name] += 1
            continue
        result.done[fault.name] += 1
        line = f"{sum(result.done.values()):3} {fault.name} ({did}), {moment}, {ended - began:.1f} s; "
        line += f"ready again after {ready:.1f} s" if ready is not None else "NOT READY again"
        result.recovery.setdefault(fault.name, []).append(ready or READY_SECONDS)
        result.lines.append(line)
        say(line)
    return result


def wait_for_training(watcher: Watcher, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if watcher.training:
            return True
        time.sleep(0.1)
    return False


def wait_for_quiet(here: Site, ledger: Ledger) -> list[str]:
    """Wait until every job is final."""
    deadline = time.monotonic() + QUIET_SECONDS
    waiting = [s for s in ledger.sent if s.job_id]
    while waiting and time.monotonic() < deadline:
        waiting = [s for s in waiting if status_of(here, s) not in FINAL]
        time.sleep(2)
    return [f"{s.job_id} ({s.key}) is {status_of(here, s)} after {QUIET_SECONDS:g} s of quiet" for s in waiting]


def say(line: str) -> None:
    print(line, flush=True)


def show(report: dict[str, Any]) -> None:
    """A table of faults and checks, then the report as a JSON line."""
    print(f"\n{'fault':28} rounds  slowest recovery")
    for name, count in report["faults"].items():
        print(f"{name:28} {count:6}  {report['slowest_recovery_s'].get(name, 0):.1f} s")
    print(f"\n{'check':34} violations")
    for name, wrong in report["found"].items():
        print(f"{name:34} {len(wrong):6}")
        for line in wrong:
            print(f"    {line}")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
