#!/usr/bin/env python3
"""More adapters than the engine keeps: tokens per second with few of them in memory against all, and how long streams wait.

--streams clients ask one request after the other for --seconds, greedy, --prompt token ids and --new tokens whatever they
are, each for an adapter drawn by Zipf's law (the k-th of --names with a weight of 1/k). An adapter that was evicted is read
again when a request names it, outside the engine's thread. Figures, of each number of --resident places: output tokens per
second; requests that had to wait for a read, and how long; the longest and the 99th percentile of the time between two
deltas of a running stream, which is what a load costs the others. Every adapter is loaded once before the clock starts: on a
GPU those without a place wait in the host's memory, as far as --host-gib goes.

Adapters are random ones on all projections; --files of them are made, and hard links give the others their weights: each
is read from its own folder, out of the page cache. Weights of the base are random, in a Llama's shape. Each number of
places runs in a process of its own.

    python benchmarks/serving/many_adapters.py                    # a tiny model on a CPU: shows that it works
    python benchmarks/serving/many_adapters.py --size 1b --models /tmp/models --names 1000 --resident 1000,16
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks import common
from benchmarks.serving.throughput import make_adapters
from benchmarks.training.overhead import SHAPES, make_model


def link_adapters(made: list[Path], folder: Path, count: int) -> list[Path]:
    """`count` folders whose files are hard links to those of `made`, taken in turn."""
    found = [folder / f"{made[0].name}-{i:04}" for i in range(count)]
    for i, path in enumerate(found):
        path.mkdir(parents=True, exist_ok=True)
        for file in made[i % len(made)].iterdir():
            if not (path / file.name).exists():
                os.link(file, path / file.name)
    return found


async def load_all(engine: Any, folders: list[Path]) -> list[float]:
    """Load each once; seconds of each."""
    seconds = []
    for path in folders:
        at = time.monotonic()
        await asyncio.to_thread(engine.adapters.load, path.name, path)
        seconds.append(time.monotonic() - at)
    return seconds


async def ask(engine: Any, folders: list[Path], arguments: argparse.Namespace) -> dict[str, Any]:
    """Clients that ask for --seconds; what they saw."""
    from worker.engine.request import Request, SamplingParams

    vocabulary = min(8000, SHAPES[arguments.size]["vocab_size"])
    weights = [1 / (k + 1) for k in range(len(folders))]
    params = SamplingParams(max_tokens=arguments.new, temperature=0.0)
    waits: list[float] = []
    gaps: list[float] = []
    made = requests = 0
    end = time.monotonic() + arguments.seconds

    async def client(number: int) -> None:
        nonlocal made, requests
        numbers = random.Random(number)
        while time.monotonic() < end:
            name = numbers.choices(folders, weights)[0].name
            adapter = engine.adapters.peek(name)
            if adapter is None:
                at = time.monotonic()
                adapter = await asyncio.to_thread(engine.adapters.get, name)
                waits.append(time.monotonic() - at)
            ids = [numbers.randrange(3, vocabulary) for _ in range(arguments.prompt)]
            requests += 1
            request = Request(f"{number}-{requests}", ids, params, key=name, adapter=adapter.weights)
            stream = engine.submit([request], adapter)[0]
            last, finished = 0.0, False
            while not finished:
                delta = await stream.get()
                if delta.error is not None:
                    raise delta.error
                now, finished = time.monotonic(), delta.finish_reason is not None
                if last:
                    gaps.append(now - last)
                last = now
                made += len(delta.token_ids) if now < end else 0

    await asyncio.gather(*(client(i) for i in range(arguments.streams)))
    return {"made": made, "requests": requests, "waits": waits, "gaps": gaps}


def part(arguments: argparse.Namespace, resident: int) -> None:
    """Print a line of JSON a figure, with `resident` places."""
    import torch

    from service.settings import Settings
    from worker.engine.engine import Engine
    from worker.engine.registry import room_for
    from worker.engine.runner import ModelRunner

    torch.set_num_threads(arguments.threads)
    files = make_adapters(arguments.size, arguments.models, arguments.files, arguments.rank)
    folders = link_adapters(files, arguments.models / "links", arguments.names)
    settings = Settings(
        base_model=str(arguments.models / arguments.size),
        engine_max_batch=arguments.streams,
        engine_max_seq_length=arguments.prompt + arguments.new + 32,
        engine_max_adapters=resident,
        engine_cache_bytes=int(arguments.cache_gib * 2**30),
        engine_adapter_host_bytes=None if arguments.host_gib is None else int(arguments.host_gib * 2**30),
    )
    runner = ModelRunner(settings)
    engine = Engine(
        runner,
        max_batch=settings.engine_max_batch,
        max_queue=settings.engine_max_queue,
        room=room_for(settings, runner.device),
    )

    async def go() -> tuple[list[float], dict[str, Any]]:
        engine.start(asyncio.get_running_loop())
        loads = await load_all(engine, folders)
        warm = argparse.Namespace(**{**vars(arguments), "seconds": arguments.warm_up})
        await ask(engine, folders, warm)
        seen = await ask(engine, folders, arguments)
        await asyncio.to_thread(engine.stop)
        return loads, seen

    loads, seen = asyncio.run(go())
    figures = {
        "output_tokens_per_s": seen["made"] / arguments.seconds,
        "requests": seen["requests"],
        "requests that waited for a read": len(seen["waits"]),
        **{f"load alone {k}": v for k, v in common.milliseconds(loads, 50, 99).items()},
        **{f"wait for a read {k}": v for k, v in common.milliseconds(seen["waits"] or [0.0], 50, 99).items()},
        **{f"between deltas {k}": v for k, v in common.milliseconds(seen["gaps"], 50, 99, 99.9).items()},
    }
    for figure, value in figures.items():
        print(json.dumps({"figure": figure, "resident": resident, "value": round(value, 2)}), flush=True)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--size", choices=["tiny", "1b", "8b"], default="tiny")
    parser.add_argument("--names", type=int, default=100, help="adapters (default: 100)")
    parser.add_argument("--resident", default="100,16", help="places, by commas; the first is compared with")
    parser.add_argument("--files", type=int, default=32, help="adapters with weights of their own (default: 32)")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--streams", type=int, default=32, help="clients (default: 32)")
    parser.add_argument("--prompt", type=int, default=64, help="tokens (default: 64)")
    parser.add_argument("--new", type=int, default=128, help="tokens (default: 128)")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--warm-up", type=float, default=3.0, help="seconds of the same before, not counted")
    parser.add_argument("--cache-gib", type=float, default=4.0, help="LORRY_ENGINE_CACHE_BYTES (default: 4)")
    parser.add_argument("--host-gib", type=float, help="LORRY_ENGINE_ADAPTER_HOST_BYTES (default: its own)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch (default: one a core)")
    parser.add_argument("--models", type=Path, help="folder in which model and adapters are kept for the next run")
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if arguments.part is not None:
        return part(arguments, arguments.part)
    with common.folder() as where:
        models = arguments.models or where
        if not (models / arguments.size).exists():
            make_model(arguments.size, str(models))
        report = common.Report("serving/many_adapters", common.wait_until_calm(arguments.calm))
        rates: list[float] = []
        for resident in map(int, arguments.resident.split(",")):
            command = [sys.executable, __file__, *sys.argv[1:], "--models", str(models), "--part", str(resident)]
            done = subprocess.run(command, env=common.environment(where), stdout=subprocess.PIPE, text=True, check=True)
            for line in done.stdout.splitlines():
                if line.startswith('{"figure"'):
                    figure = json.loads(line)
                    if figure["figure"] == "output_tokens_per_s":
                        rates.append(figure["value"])
                    report.add(figure.pop("figure"), figure.pop("value"), size=arguments.size, **figure)
            if len(rates) > 1:
                ratio = round(rates[-1] / rates[0], 3)
                report.add(
                    "to the first", ratio, size=arguments.size, resident=resident, aim="at least 0.5", met=ratio >= 0.5
                )
        report.show()


if __name__ == "__main__":
    main()
