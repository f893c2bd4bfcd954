#!/usr/bin/env python3
"""Streams through the whole of it: clients → `lorry api` → `lorry engine`, each a process, over sockets.

POST /v1/completions with stream=true, greedy, texts of --prompt tokens, --new tokens whatever they are; the requests of a
round come at once and take turns with the adapters. The same is asked of the API and of the engine's own port, round by
round in turn; the best of --rounds counts, after a warm-up. Figures: output tokens per second from the first request to the
last byte; time from a request to its first event; processor time by process and token, from /proc. The clients are
--clients processes that read bytes and parse next to nothing: their processor time is shown as a share of what they could
use, and a share near 1 means that they are what was measured.

Adapters are random ones of rank --rank, in the API's registry as a finished job leaves them; prompts are rendered with
their stored template. Weights are random, in a Llama's shape.

    python benchmarks/serving/end_to_end.py --streams 1,8,64        # a tiny model on a CPU: shows that it works
    python benchmarks/serving/end_to_end.py --size 1b --models /tmp/models --streams 1,64,500 --adapters 8
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import resource
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks import common
from benchmarks.load import parts

TEXTS = 64
USAGE = re.compile(rb'"completion_tokens":\s*(\d+)')
TARGETS = ("engine", "api")


# The model and its adapters


def prepare(folder: Path, size: str, adapters: int, rank: int, prompt: int) -> None:
    """Model, adapters with the base's template beside them, and texts, made if missing. Imports torch."""
    from transformers import AutoTokenizer

    from benchmarks.serving.throughput import make_adapters
    from benchmarks.training.overhead import make_model, same_length_rows
    from worker.data import base_template

    base = folder / size
    if not base.exists():
        make_model(size, str(folder))
    template = base_template(AutoTokenizer.from_pretrained(base)).model_dump_json()
    for path in make_adapters(size, folder, adapters, rank):
        (path / "lorry_template.json").write_text(template, encoding="utf-8")
    same_length_rows(
        base, prompt + 1, TEXTS, folder / f"{size}-texts-{prompt}.jsonl"
    )  # one more: they count an end token


def register(database_url: str, folders: list[Path], base: Path) -> None:
    """The adapters as finished jobs leave them."""
    from service.db import Database
    from tests.serving import register as register_one

    db = Database(database_url)
    for path in folders:
        register_one(db, path.name, path, str(base))


# The clients


@dataclass
class Seen:
    """What one process of clients saw; times on time.monotonic's clock, which is the machine's."""

    began: float = 0.0
    ended: float = 0.0
    cpu: float = 0.0  # processor time, seconds
    tokens: int = 0
    refused: int = 0
    errors: int = 0
    first: list[float] = field(default_factory=list)  # seconds from a request to its first event


async def one(url: str, body: bytes, jitter: random.Random, seen: Seen) -> None:
    while True:
        began = time.monotonic()
        connection = await parts.Connection.open(url, "POST", "/v1/completions", body, Content_Type="application/json")
        end, first = b"", 0.0
        try:
            status = await connection.begin()
            if status == 503:
                seen.refused += 1
                again = re.search(r"retry-after: (\d+)", connection.head, re.IGNORECASE)
                await asyncio.sleep((int(again[1]) if again else 1) * jitter.uniform(0.5, 1.5))
                continue
            async for piece in connection.pieces():
                if not first and b"data:" in piece:  # not a comment that keeps the connection open
                    first = time.monotonic()
                end = (end + piece)[-2048:]
        finally:
            connection.close()
        break
    usage = USAGE.search(end)
    if status != 200 or usage is None or b"[DONE]" not in end:
        seen.errors += 1
        return
    seen.tokens += int(usage[1])
    seen.first.append(first - began)


async def together(url: str, bodies: list[bytes], seed: int) -> Seen:
    seen, before = Seen(time.monotonic()), cpu_of_this()
    jitter = random.Random(seed)
    done = await asyncio.gather(*(one(url, body, jitter, seen) for body in bodies), return_exceptions=True)
    seen.errors += sum(isinstance(outcome, Exception) for outcome in done)
    seen.ended, seen.cpu = time.monotonic(), cpu_of_this() - before
    return seen


def cpu_of_this() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def client_part() -> None:
    """A line of JSON a round on the standard input, what was seen on a line back."""
    print("ready", flush=True)
    for line in sys.stdin:
        wanted = json.loads(line)
        bodies = [json.dumps(body).encode() for body in wanted["bodies"]]
        seen = asyncio.run(together(wanted["url"], bodies, wanted["seed"])) if bodies else Seen()
        print(json.dumps(vars(seen)), flush=True)


class Clients:
    """Processes of clients."""

    def __init__(self, stack: ExitStack, where: Path, count: int) -> None:
        command = [sys.executable, __file__, "--part", "client"]
        self._processes = []
        for _ in range(count):
            process = subprocess.Popen(
                command, env=common.environment(where), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            self._processes.append(process)
        for process in self._processes:
            assert self._read(process) == "ready"

    def run(self, url: str, bodies: list[dict[str, Any]]) -> list[Seen]:
        """Send all requests at once, spread over the processes."""
        busy = self._processes[: len(bodies)]
        for i, process in enumerate(busy):
            assert process.stdin is not None
            wanted = {"url": url, "bodies": bodies[i :: len(busy)], "seed": i}
            print(json.dumps(wanted), file=process.stdin, flush=True)
        return [Seen(**json.loads(self._read(process))) for process in busy]

    @staticmethod
    def _read(process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"a process of clients ended with {process.wait()}")
        return line.strip()


# The run


@dataclass
class Round:
    """One round's figures."""

    tokens_per_s: float
    first: list[float]
    refused: int
    clients: float  # their processor time over what their processes could have used
    spent: dict[str, float]  # microseconds of processor time a token, by process


def play(clients: Clients, url: str, bodies: list[dict[str, Any]], watched: dict[str, parts.Watched]) -> Round:
    for process in watched.values():
        process.mark()
    seen = clients.run(url, bodies)
    spent = {name: process.spent() for name, process in watched.items()}
    if errors := sum(s.errors for s in seen):
        raise SystemExit(f"{errors} of {len(bodies)} streams failed at {url}")
    tokens = sum(s.tokens for s in seen)
    wanted = sum(body["max_tokens"] for body in bodies)
    if tokens != wanted:
        raise SystemExit(f"{tokens} tokens came, {wanted} were asked for")
    seconds = max(s.ended for s in seen) - min(s.began for s in seen)
    return Round(
        tokens / seconds,
        [value for s in seen for value in s.first],
        sum(s.refused for s in seen),
        sum(s.cpu for s in seen) / (seconds * len(seen)),
        {name: 1e6 * value / tokens for name, value in spent.items()},
    )


def measure(arguments: argparse.Namespace, where: Path, report: common.Report) -> None:
    models, size = arguments.models, arguments.size
    base = models / size
    folders = [models / f"{size}-r{arguments.rank}-{i}" for i in range(arguments.adapters)]
    texts = (models / f"{size}-texts-{arguments.prompt}.jsonl").read_text("utf-8").splitlines()
    most = max(arguments.streams)
    batch = min(arguments.batch, most)
    names = [path.name for path in folders] or [str(base)]
    bodies = [
        {
            "model": names[i % len(names)], "prompt": json.loads(texts[i % TEXTS])["text"], "max_tokens": arguments.new,
            "temperature": 0, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
        }
        for i in range(most)
    ]  # fmt: skip
    limits = {
        "engine_max_batch": str(batch), "engine_max_queue": str(max(1, most - batch)),
        "engine_max_seq_length": str(arguments.prompt + arguments.new + 32),
        "engine_max_adapters": str(max(1, len(folders))), "log_level": "ERROR",
        "torch_threads": "1" if size == "tiny" else "0",
    }  # fmt: skip
    with ExitStack() as stack:
        database_url = stack.enter_context(common.database("sqlite", where))
        redis_url = stack.enter_context(common.queue_server(where))
        register(database_url, folders, base)
        engine = stack.enter_context(parts.engine(where, base, **limits))
        more = {"engine_url": engine.url, "base_model": str(base), "log_level": "ERROR"}
        api = stack.enter_context(parts.api(where, database_url, redis_url, **more))
        clients = Clients(stack, where, arguments.clients)
        watched = {"engine": engine, "api": api}
        play(clients, api.url, bodies, watched)  # a warm-up, which loads the adapters
        for streams in arguments.streams:
            best: dict[str, Round] = {}
            for _ in range(arguments.rounds):
                for target in TARGETS:
                    done = play(clients, watched[target].url, bodies[:streams], watched)
                    print(f"{streams} streams, {target}: {done.tokens_per_s:.0f} tokens/s", file=sys.stderr, flush=True)
                    if target not in best or done.tokens_per_s > best[target].tokens_per_s:
                        best[target] = done
            show(report, streams, len(folders), best)


def show(report: common.Report, streams: int, adapters: int, best: dict[str, Round]) -> None:
    for target, done in best.items():
        case = {"through": target, "streams": streams, "adapters": adapters}
        report.add("output_tokens_per_s", round(done.tokens_per_s, 1), **case)
        firsts = common.milliseconds(done.first, 50, 99)
        report.add_all({f"first event {name}": value for name, value in firsts.items()}, **case)
        for name, spent in done.spent.items():
            if name == "engine" or target == "api":
                report.add(f"{name} processor time a token, us", round(spent, 1), **case)
        report.add("clients' share of their processors", round(done.clients, 2), **case)
        if done.refused:
            report.add("answers 503", done.refused, **case)
    through, direct = best["api"], best["engine"]
    case = {"through": "api to engine", "streams": streams, "adapters": adapters}
    report.add("ratio of tokens_per_s", round(through.tokens_per_s / direct.tokens_per_s, 3), **case)
    for percent in (50, 99):
        later = common.percentile(through.first, percent) - common.percentile(direct.first, percent)
        report.add(f"first event p{percent} later, ms", round(1000 * later, 2), **case)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--size", choices=["tiny", "1b", "8b"], default="tiny")
    parser.add_argument("--streams", default="1,64,500", help="requests at once, by commas (default: 1,64,500)")
    parser.add_argument("--adapters", type=int, default=4, help="0: the base alone (default: 4)")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=64, help="tokens (default: 64)")
    parser.add_argument("--new", type=int, default=128, help="tokens (default: 128)")
    parser.add_argument("--batch", type=int, default=256, help="LORRY_ENGINE_MAX_BATCH at most (default: 256)")
    parser.add_argument("--rounds", type=int, default=2, help="default: 2")
    parser.add_argument("--clients", type=int, default=4, help="processes of clients (default: 4)")
    parser.add_argument("--models", type=Path, help="folder in which model and adapters are kept for the next run")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part == "client":
        return client_part()
    arguments.streams = [int(n) for n in arguments.streams.split(",")]
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    parts.many_files()
    with common.folder() as where:
        arguments.models = (arguments.models or where / "models").absolute()
        if arguments.part == "prepare":
            return prepare(arguments.models, arguments.size, arguments.adapters, arguments.rank, arguments.prompt)
        arguments.models.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, __file__, *sys.argv[1:], "--models", str(arguments.models), "--part", "prepare"]
        subprocess.run(command, env=common.environment(where), check=True)
        report = common.Report("serving/end_to_end", common.wait_until_calm(arguments.calm))
        measure(arguments, where, report)
        report.show()


if __name__ == "__main__":
    main()
