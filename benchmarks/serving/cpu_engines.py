"""The engines of cpu.py, each started in processes of its own; what is timed is a call that sends a round's requests."""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from benchmarks import common
from benchmarks.load import parts

PLACES = 8  # requests that an engine runs at once

Round = Callable[[int, bool], None]  # (streams, with adapters): sends them all and waits for the last answer
Ways = list[Round]  # of doing the same; with adapters the best counts, without them only the first is gone


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
    command = [
        sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve", base,
        "--continuous-batching", "--device", "cpu", "--dtype", dtype, "--port", str(port), "--host", "127.0.0.1",
    ]  # fmt: skip
    env = common.environment(where) | {"OMP_NUM_THREADS": str(a.threads)}
    url = f"http://127.0.0.1:{port}"
    with open(where / f"serve-{dtype}.log", "wb") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    try:
        common.wait_for(f"{url}/health", process, where / f"serve-{dtype}.log")
        config = json.dumps({"max_new_tokens": a.new, "do_sample": False, "eos_token_id": None})

        def run(streams: int, adapted: bool) -> None:
            assert not adapted
            bodies = [{"model": base, "prompt": a.texts[i], "generation_config": config} for i in range(streams)]
            check(all_at_once(url, "/v1/completions", bodies, usage), streams, a.new)

        yield [run]
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def llama(a: argparse.Namespace, where: Path) -> Iterator[Ways]:
    """Two servers: one that has adapters loaded computes all of them for every request, with scale 0 where not asked for."""
    with ExitStack() as stack:
        without = stack.enter_context(part(a, where, "llama", "", adapters=0))
        loaded = stack.enter_context(part(a, where, "llama", ""))

        def run(streams: int, adapted: bool) -> None:
            bodies: list[dict[str, Any]] = [
                {"prompt": a.texts[i], "n_predict": a.new, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
                for i in range(streams)
            ]
            if adapted:
                for i, body in enumerate(bodies):
                    body["lora"] = [{"id": i % a.adapters, "scale": 1.0}]
            url = (loaded if adapted else without).said
            check(
                all_at_once(url, "/completion", bodies, lambda answer: int(answer["tokens_predicted"])), streams, a.new
            )

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
    """cpu.py in a process of its own, asked by lines."""

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
def part(a: argparse.Namespace, where: Path, name: str, dtype: str, **others: int) -> Iterator[Child]:
    """`cpu.py --part name`, with these options changed."""
    script = Path(__file__).with_name("cpu.py")
    command = [sys.executable, str(script), "--part", name, "--dtype", dtype, "--models", str(a.models)]
    for option in ("adapters", "new", "threads"):
        command += [f"--{option}", str(others.get(option, getattr(a, option)))]
    env = common.environment(where) | {"OMP_NUM_THREADS": str(a.threads)}
    with open(where / f"{name}{dtype}.log", "ab") as log:
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
