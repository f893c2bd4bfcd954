#!/usr/bin/env python3
"""Output tokens per second on a CPU: lorry's engine, transformers and llama.cpp on the built-in model, in one run.

SmolLM2-135M-Instruct, the base alone and with 4 LoRA adapters of rank 16 on all projections taken in turn; texts of 64
tokens, 64 new ones, greedy, no end token ends anything. All requests of a round come at once; its figure is all output
tokens over the time from the first request to the last answer, prompts included. Every engine is started at the start, with
--threads threads each, and they take turns round by round, so that what else the machine does hits all alike; the best
round counts, the first is a warm-up.

lorry, lorry-f16  `lorry engine` over HTTP, as it comes (float32) and with LORRY_ENGINE_DTYPE=float16
generate-TYPE     transformers' generate and PEFT in a process of their own, no HTTP: one batch of all requests; with
                  adapters a batch per adapter, or all in one batch (PEFT's adapter_names): the better of both
serve-TYPE        `transformers serve --continuous-batching` over HTTP; it has no adapters
llama.cpp         its server over HTTP (package xllamacpp), the base as f16 GGUF, adapters as f16 GGUF LoRA, 8 slots; for the
                  base alone a server without adapters

What is not installed is left out. lorry's ratio is that of its better dtype to the peer's better one.

    python benchmarks/serving/cpu.py --models /tmp/models            # 3 rounds: about 10 minutes on two idle cores
    python benchmarks/serving/cpu.py --models /tmp/models --engines lorry,lorry-f16,llama.cpp --rounds 5
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks import common
from benchmarks.serving.cpu_engines import PLACES, Ways, engine, generate_part, installed, llama_part
from benchmarks.serving.throughput import make_adapter
from benchmarks.training.overhead import same_length_rows

ENGINES = (
    "lorry", "lorry-f16", "generate-float32", "generate-bfloat16", "serve-float32", "serve-bfloat16", "llama.cpp",
)  # fmt: skip
PEERS = {"generate": ("ahead", 1.0), "serve": ("ahead", 1.0), "llama.cpp": ("at least 0.8", 0.8)}


# What is served


def prepare(folder: Path, adapters: int, rank: int, prompt: int) -> None:
    """The built-in model, adapters, texts, and the same as GGUF, made in `folder` if missing. Imports torch."""
    from transformers import AutoConfig

    from worker.base_model import unpack_builtin

    base = unpack_builtin(folder)
    if not (folder / "base").exists():
        (folder / "base").symlink_to(base.name)
    config = AutoConfig.from_pretrained(base)
    for i in range(adapters):
        make_adapter(folder / f"lora-{i}", folder / "base", config.to_dict(), rank, seed=i, rslora=False)
    same_length_rows(base, prompt + 1, PLACES, folder / "texts.jsonl")  # one more: they count an end token
    if importlib.util.find_spec("xllamacpp") is not None and not (folder / "base.gguf").exists():
        write_gguf(folder, base, adapters)


def write_gguf(folder: Path, base: Path, adapters: int) -> None:
    from transformers import AutoTokenizer

    from service.errors import JobFailure
    from service.settings import Settings
    from worker.data import base_template
    from worker.export import gguf, llama_cpp

    try:
        tools = llama_cpp.find(Settings())
    except JobFailure as missing:
        print(f"note: no llama.cpp: {missing.message}", file=sys.stderr)
        return
    for i in range(adapters):
        # The converter divides lora_alpha by r, rsLoRA or not: these adapters have none.
        outputs = [[str(folder / f"lora-{i}.gguf"), "f16"]]
        request = {"folder": str(folder / f"lora-{i}"), "base": str(base), "outputs": outputs}
        llama_cpp.run("convert_lora", request, tools)
    tokenizer = AutoTokenizer.from_pretrained(base)
    made = folder / "base.gguf.new"
    template = base_template(tokenizer)
    gguf.convert(base, made, "f16", name="base", template=template, tokenizer=tokenizer, tools=tools)
    made.rename(folder / "base.gguf")


# The run


def measure(a: argparse.Namespace, engines: dict[str, Ways]) -> dict[tuple[str, bool, int], list[float]]:
    """Tokens per second of every round after the first, by engine, adapters and streams."""
    rates: dict[tuple[str, bool, int], list[float]] = {}
    for turn in range(a.rounds + 1):
        for adapted in (False, True):
            for streams in a.streams:
                for name, ways in engines.items():
                    if adapted and name.startswith("serve"):
                        continue
                    for way in ways if adapted else ways[:1]:
                        began = time.perf_counter()
                        way(streams, adapted)
                        rate = round(streams * a.new / (time.perf_counter() - began), 1)
                        line = {"round": turn, "engine": name, "adapters": adapted, "streams": streams, "rate": rate}
                        print(json.dumps(line), file=sys.stderr, flush=True)
                        if turn:
                            rates.setdefault((name, adapted, streams), []).append(rate)
    return rates


def summarise(a: argparse.Namespace, report: common.Report, rates: dict[tuple[str, bool, int], list[float]]) -> None:
    best: dict[tuple[str, bool, int], float] = {}
    for (name, adapted, streams), all_rounds in rates.items():
        about = {"engine": name, "adapters": a.adapters if adapted else 0, "streams": streams}
        report.add("output_tokens_per_s", max(all_rounds), **about, worst=min(all_rounds))
        kind = "lorry" if name.startswith("lorry") else name.partition("-")[0]
        key = (kind, adapted, streams)
        best[key] = max(best.get(key, 0.0), max(all_rounds))
    for streams in a.streams:
        for peer, (aim, least) in PEERS.items():
            for own, theirs in ((True, False), (True, True), (False, False)):
                mine, other = best.get(("lorry", own, streams)), best.get((peer, theirs, streams))
                if mine is None or other is None:
                    continue
                about = {"adapters": a.adapters if own else 0, "streams": streams, "peer": peer}
                about["peer's adapters"] = a.adapters if theirs else 0
                ratio = round(mine / other, 3)
                report.add("ratio", ratio, **about, aim=aim, met=ratio >= least if least < 1 else ratio > 1)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--engines", default=",".join(ENGINES), help="by commas; default: all that are installed")
    parser.add_argument("--streams", default="1,8", help="requests at once, by commas, at most 8 (default: 1,8)")
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=64, help="tokens (default: 64)")
    parser.add_argument("--new", type=int, default=64, help="tokens (default: 64)")
    parser.add_argument("--rounds", type=int, default=3, help="that count (default: 3)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each engine (default: one a core)")
    parser.add_argument(
        "--models", type=Path, help="folder in which model, adapters and GGUF are kept for the next run"
    )
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    a = parser.parse_args()
    a.streams = [int(n) for n in a.streams.split(",")]
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with ExitStack() as stack:
        where = stack.enter_context(common.folder())
        a.models = (a.models or where / "models").absolute()
        if a.part == "prepare":
            return prepare(a.models, a.adapters, a.rank, a.prompt)
        if a.part is None:
            a.models.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, __file__, *sys.argv[1:], "--models", str(a.models), "--part", "prepare"]
            subprocess.run(command, env=common.environment(where), check=True)
        a.texts = [json.loads(line)["text"] for line in (a.models / "texts.jsonl").read_text("utf-8").splitlines()]
        if a.part is not None:
            return {"generate": generate_part, "llama": llama_part}[a.part](a)
        names = [name for name in a.engines.split(",") if installed(name, a.models)]
        engines = {name: stack.enter_context(engine(name, a, where)) for name in names}
        report = common.Report("serving/cpu", common.wait_until_calm(a.calm))
        summarise(a, report, measure(a, engines))
        report.show()


if __name__ == "__main__":
    main()
