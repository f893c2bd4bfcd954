#!/usr/bin/env python3
"""A training job beside streams on one GPU, under both policies of LORRY_GPU_POLICY: throughput, memory, and what failed.

API, engine and worker are processes of their own, as under `lorry up`. Clients keep streams open through the API, one after
the other, and come back after a 503 when its Retry-After says so (at most --patience seconds later). For each policy:
`before` the job, `during` its steps, `after` its end; then, once, the job with no engine on the machine (`alone`). The
memory is the whole GPU's, by nvidia-smi, at its highest in each phase. Neither a job nor a stream may fail.

    python benchmarks/serving/shared_gpu.py                      # a tiny model on a CPU: shows that it works
    python benchmarks/serving/shared_gpu.py --gpu --size 1b      # random weights in a Llama's shape, trained in NF4
    python benchmarks/serving/shared_gpu.py --gpu --size 8b --engine-4bit --cache-gib 8
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks import common
from benchmarks.load import parts
from benchmarks.training.overhead import make_spec, same_length_rows

POLICIES = ("shared", "exclusive")
PROMPT_TOKENS = 64


@dataclass
class Clients:
    """Streams under way in a thread of their own; times are time.monotonic's."""

    url: str
    model: str
    count: int
    new_tokens: int
    patience: float
    tokens: list[tuple[float, int]] = field(default_factory=list)  # when so many came
    pauses: list[tuple[float, float]] = field(default_factory=list)  # when a pause ended, and how long it was
    refused: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    finished: int = 0

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._all()), daemon=True)
        self._thread.start()

    def end(self) -> None:
        """No further stream is begun; those under way end."""
        self._stop.set()
        self._thread.join(600)
        if self._thread.is_alive():
            self.errors["stuck"] += 1

    async def _all(self) -> None:
        timeout = httpx.Timeout(30, read=None, pool=None)
        async with httpx.AsyncClient(base_url=self.url, timeout=timeout, trust_env=False) as http:
            await asyncio.gather(*(self._client(http, n) for n in range(self.count)))

    async def _client(self, http: httpx.AsyncClient, number: int) -> None:
        ids = [3 + (7 * number + i) % 200 for i in range(PROMPT_TOKENS)]
        body = {
            "model": self.model, "prompt": ids, "max_tokens": self.new_tokens, "temperature": 0, "ignore_eos": True,
            "stream": True, "return_token_ids": True,
        }  # fmt: skip
        while not self._stop.is_set():
            try:
                async with http.stream("POST", "/v1/completions", json=body) as answer:
                    if answer.status_code == 200:
                        await self._read(answer)
                        continue
                    error = json.loads(await answer.aread())["error"]["code"]
            except (httpx.HTTPError, ValueError, KeyError) as problem:
                self.errors[type(problem).__name__] += 1
                await asyncio.sleep(1)
                continue
            if answer.status_code == 503 and "retry-after" in answer.headers:
                self.refused.append(time.monotonic())
                wait = min(float(answer.headers["retry-after"]), self.patience)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(asyncio.to_thread(self._stop.wait, wait), wait)
            else:
                self.errors[f"{answer.status_code} {error}"] += 1
                await asyncio.sleep(1)

    async def _read(self, answer: httpx.Response) -> None:
        got, last = 0, time.monotonic()
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                self.errors[f"stream: {chunk['error']['code']}"] += 1
                return
            if new := sum(len(choice.get("token_ids") or ()) for choice in chunk["choices"]):
                now = time.monotonic()
                got += new
                self.tokens.append((now, new))
                self.pauses.append((now, now - last))
                last = now
        if got == self.new_tokens:
            self.finished += 1
        else:
            self.errors["short"] += 1


@dataclass
class Memory:
    """The GPU's memory in use, looked at twice a second; MiB."""

    seen: list[tuple[float, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        if shutil.which("nvidia-smi"):
            self._thread.start()

    def _watch(self) -> None:
        command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
        while not self._stop.wait(0.5):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                self.seen.append((time.monotonic(), int(done.stdout.split()[0])))

    def end(self) -> None:
        self._stop.set()

    def peak(self, start: float, stop: float) -> int | None:
        return max((mib for at, mib in self.seen if start <= at <= stop), default=None)


@contextmanager
def worker(where: Path, **variables: str) -> Iterator[None]:
    with open(where / "worker.log", "ab") as log:
        process = subprocess.Popen(
            common.lorry("worker"), env=common.environment(where, **variables), stdout=log, stderr=log
        )
    try:
        yield
    finally:
        process.terminate()
        process.wait(90)


@dataclass
class Ran:
    """A job that has ended: its points, its record, and when its steps began and ended (time.monotonic)."""

    points: list[dict[str, Any]]
    record: dict[str, Any]
    started: float
    stopped: float
    ended: float


def run_job(url: str, spec: dict[str, Any], seconds: float) -> Ran:
    """Raises SystemExit if the job fails."""
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as http:
        made = http.post("/v1/jobs", json={**spec, "adapter": f"bench-{time.time_ns()}"})
        if made.status_code != 202:
            raise SystemExit(made.text)
        at = f"/v1/jobs/{made.json()['id']}"
        deadline, started, stopped = time.monotonic() + seconds, 0.0, 0.0
        while True:
            job = http.get(at).json()
            step, total = (job["progress"].get(key) or 0 for key in ("step", "total_steps"))
            if step and not started:
                started = time.monotonic()
            if step and step == total and not stopped:
                stopped = time.monotonic()
            if job["status"] == "succeeded":
                points = http.get(f"{at}/metrics").json()["train"]
                runs = job.get("runs") or [{}]
                return Ran(points, runs[-1].get("record") or {}, started, stopped, time.monotonic())
            if job["status"] in ("failed", "cancelled") or time.monotonic() > deadline:
                raise SystemExit(f"the job is {job['status']}: {json.dumps(job.get('error'))}")
            time.sleep(0.1)


def speed(points: list[dict[str, Any]]) -> float:
    """Median of the logged tokens a second, after the first quarter of the steps."""
    rates = [p["tokens_per_second"] for p in points if p.get("tokens_per_second")]
    return round(statistics.median(rates[len(rates) // 4 :]), 1)


def serving(report: common.Report, clients: Clients, start: float, stop: float, **about: Any) -> None:
    tokens = sum(n for at, n in clients.tokens if start <= at < stop)
    report.add("served_tokens_per_s", round(tokens / max(stop - start, 1e-9), 1), **about)
    report.add("refused", sum(start <= at < stop for at in clients.refused), **about)
    pauses = [pause for at, pause in clients.pauses if start <= at < stop]
    if pauses:
        report.add("longest_pause_s", round(max(pauses), 2), **about)


def policy_run(
    arguments: argparse.Namespace, where: Path, policy: str | None, base: Path, report: common.Report
) -> None:
    """One round under a policy; None: the job without an engine."""
    about: dict[str, Any] = {"policy": policy or "alone"}
    where = where / about["policy"]
    where.mkdir()
    with ExitStack() as stack:
        url = stack.enter_context(common.database("sqlite", where))
        redis = stack.enter_context(common.queue_server(where))
        shared = {
            "database_url": url, "redis_url": redis, "base_model": str(base), "log_level": "INFO",
            "gpu_policy": policy or "shared", "gpu_grace_seconds": str(arguments.grace),
            "train_memory_fraction": str(arguments.train_fraction),
        }  # fmt: skip
        memory = Memory()
        stack.callback(memory.end)
        engine_url = f"http://127.0.0.1:{common.free_port()}"
        if policy is not None:
            length = str(PROMPT_TOKENS + arguments.new_tokens)
            engine = parts.engine(
                where, base, engine_max_seq_length=length, engine_max_batch=str(arguments.clients),
                engine_load_in_4bit=str(arguments.engine_4bit), engine_cache_bytes=str(int(arguments.cache_gib * 2**30)),
                engine_memory_fraction=str(arguments.engine_fraction), torch_threads="0" if arguments.gpu else "1",
                log_level="WARNING",
            )  # fmt: skip
            engine_url = stack.enter_context(engine).url
        api = stack.enter_context(parts.api(where, **{**shared, "engine_url": engine_url, "log_level": "ERROR"})).url
        stack.enter_context(worker(where, **shared, engine_url=engine_url))
        with httpx.Client(base_url=api, timeout=60, trust_env=False) as http, open(arguments.rows, "rb") as rows:
            sent = http.post("/v1/files", files={"file": ("rows.jsonl", rows)}, data={"purpose": "fine-tune"})
        spec = make_spec(arguments, base, sent.json()["id"])
        clients = None
        began = time.monotonic()
        if policy is not None:
            clients = Clients(api, str(base), arguments.clients, arguments.new_tokens, arguments.patience)
            time.sleep(arguments.seconds)
        submitted = time.monotonic()
        ran = run_job(api, spec, arguments.limit)
        report.add("train_tokens_per_s", speed(ran.points), **about)
        if peak := ran.record.get("peak_memory_bytes"):
            report.add("job's own peak, MiB", round(peak / 2**20), **about)
        report.add("job_s", round(ran.ended - submitted, 1), **about)
        phases = [("before", began + arguments.seconds / 2, submitted), ("during", ran.started, ran.stopped)]
        if clients is not None:
            time.sleep(arguments.seconds)
            phases.append(("after", ran.ended + arguments.seconds / 2, time.monotonic()))
            clients.end()
            first = min((at for at, _ in clients.tokens if at > ran.ended), default=None)
            if first is not None:
                report.add("job's end to next token, s", round(first - ran.ended, 2), **about)
            for phase, start, stop in phases:
                serving(report, clients, start, stop, **about, phase=phase)
            report.add("streams finished", clients.finished, **about)
            failed = sum(clients.errors.values())
            report.add("streams failed", failed, **about, aim="0", met=not failed, codes=str(dict(clients.errors)))
        for phase, start, stop in phases:
            if (used := memory.peak(start, stop)) is not None:
                report.add("gpu_mib", used, **about, phase=phase)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--gpu", action="store_true", help="train in NF4 and serve on a GPU, with --size")
    parser.add_argument("--size", choices=["1b", "8b"], default="1b", help="shape of the model on a GPU (default: 1b)")
    parser.add_argument("--policies", nargs="*", default=[*POLICIES], choices=POLICIES, help="default: both")
    parser.add_argument("--no-alone", action="store_true", help="leave out the job without an engine")
    parser.add_argument("--clients", type=int, help="streams at once (default: 2; 32 on a GPU)")
    parser.add_argument("--new-tokens", type=int, help="tokens a stream (default: 64; 512 on a GPU)")
    parser.add_argument("--seconds", type=float, help="of serving before and after the job (default: 4; 20 on a GPU)")
    parser.add_argument("--grace", type=float, default=2.0, help="LORRY_GPU_GRACE_SECONDS (default: 2)")
    parser.add_argument("--patience", type=float, default=5.0, help="longest wait after a 503, s (default: 5)")
    parser.add_argument("--cache-gib", type=float, default=0.0, help="LORRY_ENGINE_CACHE_BYTES in GiB (default: 0)")
    parser.add_argument("--engine-4bit", action="store_true", help="LORRY_ENGINE_LOAD_IN_4BIT")
    parser.add_argument("--engine-fraction", type=float, default=1.0, help="LORRY_ENGINE_MEMORY_FRACTION (default: 1)")
    parser.add_argument("--train-fraction", type=float, default=1.0, help="LORRY_TRAIN_MEMORY_FRACTION (default: 1)")
    parser.add_argument("--steps", type=int, help="optimiser steps (default: 60; 30 on a GPU)")
    parser.add_argument("--batch", type=int, help="rows a pass (default: 4; 8 on a GPU)")
    parser.add_argument("--accumulate", type=int, help="passes a step (default: 1; 2 on a GPU)")
    parser.add_argument("--length", type=int, help="tokens a row (default: 64; 2048 on a GPU)")
    parser.add_argument("--limit", type=float, default=900.0, help="longest time of a job, s (default: 900)")
    parser.set_defaults(eval_rows=8, logging_steps=1, no_embeddings=False)
    arguments = parser.parse_args()
    for name, cpu, gpu in (
        ("clients", 2, 32),
        ("new_tokens", 64, 512),
        ("seconds", 4.0, 20.0),
        ("steps", 60, 30),
        ("batch", 4, 8),
        ("accumulate", 1, 2),
        ("length", 64, 2048),
    ):
        if getattr(arguments, name) is None:
            setattr(arguments, name, gpu if arguments.gpu else cpu)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    with common.folder() as where:
        size = arguments.size if arguments.gpu else "tiny"
        make = f"from benchmarks.training.overhead import make_model; print(make_model({size!r}, {str(where)!r}))"
        made = subprocess.run(
            [sys.executable, "-c", make], env=common.environment(where), capture_output=True, text=True, check=False
        )
        if made.returncode:
            raise SystemExit(made.stderr)
        base = Path(made.stdout.splitlines()[-1])
        number = arguments.steps * arguments.batch * arguments.accumulate + arguments.eval_rows
        arguments.rows = same_length_rows(base, arguments.length, number, where / "rows.jsonl")
        report = common.Report("serving/shared_gpu", common.wait_until_calm(arguments.calm))
        for policy in [*arguments.policies, *([] if arguments.no_alone else [None])]:
            policy_run(arguments, where, policy, base, report)
        report.show()


if __name__ == "__main__":
    main()
