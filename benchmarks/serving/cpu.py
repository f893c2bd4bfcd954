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
llama.cpp         its server over HTTP (package xllamacpp), the base as f16 GGUF, adapters as f16 GGUF LoRA, 8 slots

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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks import common
from benchmarks.load import parts
from benchmarks.serving.throughput import make_adapter
from benchmarks.training.overhead import same_length_rows

ENGINES = (
    "lorry", "lorry-f16", "generate-float32", "generate-bfloat16", "serve-float32", "serve-bfloat16", "llama.cpp",
)  # fmt: skip
PEERS = {"generate": ("ahead", 1.0), "serve": ("ahead", 1.0), "llama.cpp": ("at least 0.8", 0.8)}
PLACES = 8  # requests that an engine runs at once

Round = Callable[[int, bool], None]  # (streams, with adapters): sends them all and waits for the last answer
Ways = list[Round]  # of doing the same; with adapters the best counts, without them only the first is gone


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


# The engines


def all_at_once(url: str, path: str, bodies: list[dict[str, Any]], made: Callable[[dict[str, Any]], int]) -> int:
    """Post all bodies at once; the tokens that the answers have by `made`."""

    def post(body: dict[str, Any]) -> int:
        answer = httpx.post(f"{url}{path}", json=body, timeout=600, trust_env=False)
        if answer.status_code != 200:
            raise SystemExit(f"{url}{path}: {answer.status_code} {answer.text[:500]}")
        return made(answer.json())

    with ThreadPoolExecutor(len(bodies)) as pool:
        return sum(pool.map(post, bodies))


def check(made: int, streams: int, new: int) -> None:
    if made != streams * new:
        raise SystemExit(f"{made} tokens came for {streams} requests of {new}")


def usage(answer: dict[str, Any]) -> int:
    return int(answer["usage"]["completion_tokens"])


@contextmanager
def lorry(a: argparse.Namespace, where: Path, dtype: str) -> Iterator[Ways]:
    base = a.models / "base"
    limits = {
        "torch_threads": str(a.threads), "engine_dtype": dtype, "engine_max_batch": str(PLACES),
        "engine_max_adapters": str(a.adapters), "log_level": "ERROR",
    }  # fmt: skip
    with parts.engine(where, base, **limits) as engine:
        for i in range(a.adapters):
            body = {"lora_name": f"lora-{i}", "lora_path": str(a.models / f"lora-{i}")}
            httpx.post(f"{engine.url}/v1/load_lora_adapter", json=body, timeout=60, trust_env=False).raise_for_status()

        def run(streams: int, adapted: bool) -> None:
            bodies = [
                {
                    "model": f"lora-{i % a.adapters}" if adapted else str(base), "prompt": a.texts[i],
                    "max_tokens": a.new, "temperature": 0, "ignore_eos": True,
                }
                for i in range(streams)
            ]  # fmt: skip
            check(all_at_once(engine.url, "/v1/completions", bodies, usage), streams, a.new)

        yield [run]


@contextmanager
def generate(a: argparse.Namespace, where: Path, dtype: str) -> Iterator[Ways]:
    with part(a, where, "generate", dtype) as child:

        def run(streams: int, adapted: bool, mixed: bool = False) -> None:
            child.ask(json.dumps({"streams": streams, "adapted": adapted, "mixed": mixed}))

        yield [run, partial(run, mixed=True)]


def generate_part(a: argparse.Namespace) -> None:
    """A line of JSON a round on the standard input, a line back once it is done."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(a.threads)
    base = a.models / "base"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, a.dtype)).eval()
    model.generation_config.eos_token_id = None
    peft = PeftModel.from_pretrained(model, a.models / "lora-0", adapter_name="lora-0").eval()
    for i in range(1, a.adapters):
        peft.load_adapter(a.models / f"lora-{i}", adapter_name=f"lora-{i}")
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = torch.tensor([tokenizer(text)["input_ids"] for text in a.texts])
    limits = {"max_new_tokens": a.new, "do_sample": False}

    def go(rows: torch.Tensor, **more: Any) -> None:
        out = peft.generate(input_ids=rows, attention_mask=torch.ones_like(rows), **limits, **more)
        check(out.numel() - rows.numel(), len(rows), a.new)

    print("ready", flush=True)
    for line in sys.stdin:
        wanted = json.loads(line)
        n = wanted["streams"]
        with torch.inference_mode():
            if not wanted["adapted"]:
                with peft.disable_adapter():
                    go(ids[:n])
            elif wanted["mixed"]:
                go(ids[:n], adapter_names=[f"lora-{i % a.adapters}" for i in range(n)])
            else:
                for i in range(min(n, a.adapters)):
                    peft.set_adapter(f"lora-{i}")
                    go(ids[i : n : a.adapters])
        print("done", flush=True)


@contextmanager
def serve(a: argparse.Namespace, where: Path, dtype: str) -> Iterator[Ways]:
    port, base = common.free_port(), str(a.models / "base")
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve", base]
    command += [
        "--continuous-batching",
        "--device",
        "cpu",
        "--dtype",
        dtype,
        "--port",
        str(port),
        "--host",
        "127.0.0.1",
    ]
    env = common.environment(where) | {"OMP_NUM_THREADS": str(a.threads)}
    url = f"http://127.0.0.1:{port}"
    with open(where / f"serve-{dtype}.log", "wb") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    try:
        wait(url, process, where / f"serve-{dtype}.log")
        config = json.dumps({"max_new_tokens": a.new, "do_sample": False, "eos_token_id": None})

        def run(streams: int, adapted: bool) -> None:
            assert not adapted
            bodies = [{"model": base, "prompt": a.texts[i], "generation_config": config} for i in range(streams)]
            check(all_at_once(url, "/v1/completions", bodies, usage), streams, a.new)

        yield [run]
    finally:
        process.terminate()
        process.wait(30)


def wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 180
    while True:
        try:
            if httpx.get(f"{url}/health", trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"no server at {url}:\n{log.read_text()[-2000:]}")
        time.sleep(0.1)


@contextmanager
def llama(a: argparse.Namespace, where: Path) -> Iterator[Ways]:
    with part(a, where, "llama", "") as child:

        def run(streams: int, adapted: bool) -> None:
            bodies = [
                {
                    "prompt": a.texts[i], "n_predict": a.new, "temperature": 0, "ignore_eos": True, "cache_prompt": False,
                    "lora": [{"id": i % a.adapters, "scale": 1.0}] if adapted else [],
                }
                for i in range(streams)
            ]  # fmt: skip
            made = all_at_once(child.said, "/completion", bodies, lambda answer: int(answer["tokens_predicted"]))
            check(made, streams, a.new)

        yield [run]


def llama_part(a: argparse.Namespace) -> None:
    """llama.cpp's server in this process; prints its address and waits for the end of the standard input."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(a.models / "base.gguf")
    params.n_parallel, params.n_ctx = PLACES, PLACES * 256
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = a.threads
    params.port, params.verbosity = 0, 0
    params.lora_adapters = [
        xllamacpp.CommonAdapterLoraInfo(str(a.models / f"lora-{i}.gguf"), 1.0) for i in range(a.adapters)
    ]
    params.lora_init_without_apply = True
    server = xllamacpp.Server(params)
    print(f"ready {server.listening_address}", flush=True)
    sys.stdin.read()


class Child:
    """This script in a process of its own, asked by lines."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.said = self._line("ready")

    def ask(self, line: str) -> None:
        assert self.process.stdin is not None
        print(line, file=self.process.stdin, flush=True)
        self._line("done")

    def _line(self, begin: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(begin):
                return line.removeprefix(begin).strip()
        raise SystemExit(f"a process ended with {self.process.wait()}")


@contextmanager
def part(a: argparse.Namespace, where: Path, name: str, dtype: str) -> Iterator[Child]:
    command = [sys.executable, __file__, "--part", name, "--dtype", dtype, "--models", str(a.models)]
    for option in ("adapters", "new", "threads"):
        command += [f"--{option}", str(getattr(a, option))]
    env = common.environment(where) | {"OMP_NUM_THREADS": str(a.threads)}
    with open(where / f"{name}{dtype}.log", "wb") as log:
        process = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )
    try:
        yield Child(process)
    finally:
        process.kill()
        process.wait()


def engine(name: str, a: argparse.Namespace, where: Path) -> Any:
    if name.startswith("lorry"):
        return lorry(a, where, "float16" if name == "lorry-f16" else "auto")
    if name == "llama.cpp":
        return llama(a, where)
    kind, _, dtype = name.partition("-")
    return {"generate": generate, "serve": serve}[kind](a, where, dtype)


def installed(name: str, models: Path) -> bool:
    if name.startswith("serve"):
        return all(importlib.util.find_spec(package) for package in ("openai", "fastapi", "uvicorn"))
    return name != "llama.cpp" or (models / "base.gguf").exists()


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
