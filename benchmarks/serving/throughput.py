#!/usr/bin/env python3
"""Output tokens per second at several numbers of streams: the engine, and vLLM where it is installed, on the same model.

All requests of a round come at once and take turns with the adapters; prompts are token ids, decoding is greedy and an end
token ends nothing, so that every request makes the same number of tokens. A round's figure is all its output tokens over
the time from the first request to the last token, prompts included; the best of --rounds is shown. The engine is driven
through its own Engine and RequestStream, and makes text of its tokens; vLLM through LLM.generate, and makes none. Weights
are random, in a Llama's shape: speed does not depend on them. Each engine runs in a process of its own.

    python benchmarks/serving/throughput.py                       # a tiny model on a CPU: shows that it works
    python benchmarks/serving/throughput.py --size 1b --models /tmp/models --engines lorry,vllm
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
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
from benchmarks.training.overhead import SHAPES, make_model

# What vLLM is told, beside the model: its own defaults but for these.
VLLM = {"max_model_len": 2048, "gpu_memory_utilization": 0.6, "enable_prefix_caching": False, "disable_log_stats": True}
VLLM_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_NO_USAGE_STATS": "1",
}


def make_adapters(size: str, folder: Path, count: int, rank: int, embeddings: bool = False) -> list[Path]:
    """Folders of `count` random PEFT adapters on all projections, made if missing; `embeddings`: and both trained."""
    made = [folder / f"{size}-r{rank}{'-embeddings' if embeddings else ''}-{i}" for i in range(count)]
    for i, path in enumerate(made):
        make_adapter(path, folder / size, SHAPES[size], rank, seed=i, embeddings=embeddings)
    return made


def make_adapter(
    path: Path,
    base: Path,
    shape: dict[str, Any],
    rank: int,
    *,
    seed: int,
    rslora: bool = True,
    embeddings: bool = False,
) -> None:
    """A random PEFT adapter on all projections of a Llama of this shape (its config's names), made if missing."""
    import torch
    from safetensors.torch import save_file

    if (path / "adapter_config.json").exists():
        return
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    width = shape.get("head_dim") or hidden // shape["num_attention_heads"]
    q, kv = width * shape["num_attention_heads"], width * shape["num_key_value_heads"]
    sites = {
        "self_attn.q_proj": (hidden, q), "self_attn.k_proj": (hidden, kv), "self_attn.v_proj": (hidden, kv),
        "self_attn.o_proj": (q, hidden), "mlp.gate_proj": (hidden, inner), "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }  # fmt: skip
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "use_rslora": rslora,
        "bias": "none", "target_modules": [name.partition(".")[2] for name in sites],
        "base_model_name_or_path": str(base),
    }  # fmt: skip
    path.mkdir(parents=True, exist_ok=True)
    random_numbers = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(shape["num_hidden_layers"]):
        for name, (fan_in, fan_out) in sites.items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            a = torch.randn(rank, fan_in, generator=random_numbers) / fan_in**0.5
            tensors[f"{key}.lora_A.weight"] = a.bfloat16()
            b = 0.01 * torch.randn(fan_out, rank, generator=random_numbers)
            tensors[f"{key}.lora_B.weight"] = b.bfloat16()
    if embeddings:
        config["modules_to_save"] = ["embed_tokens", "lm_head"]
        for key in ("model.embed_tokens", "lm_head"):
            matrix = 0.02 * torch.randn(shape["vocab_size"], hidden, generator=random_numbers)
            tensors[f"base_model.model.{key}.weight"] = matrix.bfloat16()
    save_file(tensors, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def prompts(arguments: argparse.Namespace) -> list[list[int]]:
    numbers = random.Random(0)
    most = min(8000, SHAPES[arguments.size]["vocab_size"])
    return [[numbers.randrange(3, most) for _ in range(arguments.prompt)] for _ in range(max(arguments.streams))]


def lorry_rounds(arguments: argparse.Namespace, model: Path, folders: list[Path]) -> None:
    """Print a line of JSON a figure of the engine."""
    import torch

    from service.settings import Settings
    from worker.engine.engine import Engine
    from worker.engine.registry import Room
    from worker.engine.request import Request, SamplingParams
    from worker.engine.runner import ModelRunner

    began = time.monotonic()
    settings = Settings(
        base_model=str(model),
        engine_max_batch=max(arguments.streams),
        engine_max_seq_length=arguments.length,
        engine_max_adapters=max(1, len(folders)),
        engine_load_in_4bit=arguments.nf4,
        engine_cuda_graphs=not arguments.no_graphs,
    )
    engine = Engine(
        ModelRunner(settings),
        max_batch=settings.engine_max_batch,
        max_queue=settings.engine_max_queue,
        room=Room(settings.engine_max_adapters),
    )
    print(json.dumps({"figure": "start_s", "engine": "lorry", "value": round(time.monotonic() - began, 1)}), flush=True)
    loaded = [engine.adapters.load(path.name, path) for path in folders]
    ids = prompts(arguments)

    async def go(n: int) -> float:
        params = SamplingParams(max_tokens=arguments.new, temperature=0.0)
        requests, adapters = [], []
        for i in range(n):
            adapter = loaded[i % len(loaded)] if loaded else None
            adapters.append(adapter)
            requests.append(
                Request(
                    f"{n}-{i}-{time.monotonic()}",
                    ids[i],
                    params,
                    key=adapter.name if adapter else "",
                    adapter=adapter.weights if adapter else None,
                )
            )
        at = time.monotonic()
        streams = [engine.submit([r], a)[0] for r, a in zip(requests, adapters, strict=True)]

        async def read(stream: Any) -> int:
            tokens = 0
            while True:
                delta = await stream.get()
                if delta.error is not None:
                    raise delta.error
                tokens += len(delta.token_ids)
                if delta.finish_reason is not None:
                    return tokens

        made = sum(await asyncio.gather(*map(read, streams)))
        assert made == n * arguments.new, (made, n)
        return made / (time.monotonic() - at)

    async def all_rounds() -> None:
        engine.start(asyncio.get_running_loop())
        await go(max(arguments.streams))
        for n in arguments.streams:
            await go(n)
            show("lorry", n, len(folders), [await go(n) for _ in range(arguments.rounds)])
        await asyncio.to_thread(engine.stop)

    asyncio.run(all_rounds())
    if torch.cuda.is_available():
        whole = torch.cuda.max_memory_allocated() / 2**30
        held = engine.runner.num_blocks * engine.runner.cache.bytes_per_block(torch.bfloat16) / 2**30
        for figure, value in (("peak_gib", whole), ("of it cache_gib", held)):
            line = {"figure": figure, "engine": "lorry", "adapters": len(folders), "value": round(value, 2)}
            print(json.dumps(line), flush=True)


def vllm_rounds(arguments: argparse.Namespace, model: Path, folders: list[Path]) -> None:
    """As `lorry_rounds`, of vLLM."""
    os.environ.update(VLLM_ENVIRONMENT)
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    more: dict[str, Any] = {}
    if folders:
        more = {"enable_lora": True, "max_loras": len(folders), "max_lora_rank": arguments.rank, "max_cpu_loras": 64}
    llm = LLM(model=str(model), dtype="bfloat16", max_num_seqs=max(arguments.streams), **VLLM, **more)
    params = SamplingParams(max_tokens=arguments.new, temperature=0, ignore_eos=True, detokenize=False)
    ids = prompts(arguments)

    def go(n: int) -> float:
        lora = None
        if folders:
            lora = [LoRARequest(f.name, i + 1, str(f)) for i, f in enumerate(folders)]
            lora = [lora[i % len(lora)] for i in range(n)]
        at = time.monotonic()
        tokens = [{"prompt_token_ids": x} for x in ids[:n]]
        outputs = llm.generate(tokens, params, lora_request=lora, use_tqdm=False)
        return sum(len(o.outputs[0].token_ids) for o in outputs) / (time.monotonic() - at)

    go(min(8, max(arguments.streams)))
    for n in arguments.streams:
        go(n)
        show("vllm", n, len(folders), [go(n) for _ in range(arguments.rounds)])


def show(engine: str, streams: int, adapters: int, rates: list[float]) -> None:
    line = {"figure": "output_tokens_per_second", "engine": engine, "adapters": adapters, "streams": streams}
    print(json.dumps({**line, "value": round(max(rates)), "all": [round(r) for r in rates]}), flush=True)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--size", choices=["tiny", "1b", "8b"], default="tiny")
    parser.add_argument("--engines", default="lorry", help="lorry, vllm or both, by commas (default: lorry)")
    parser.add_argument("--streams", default="1,8,64,256", help="requests at once, by commas")
    parser.add_argument("--adapters", default="0,8", help="numbers of adapters, by commas; 0: the base alone")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=256, help="tokens")
    parser.add_argument("--new", type=int, default=128, help="tokens")
    parser.add_argument("--length", type=int, default=2048, help="the engine's longest request")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--nf4", action="store_true", help="the engine's base in NF4")
    parser.add_argument("--embeddings", action="store_true", help="adapters with embed_tokens and lm_head trained")
    parser.add_argument("--no-graphs", action="store_true", help="the engine without CUDA graphs")
    parser.add_argument("--models", type=Path, help="folder in which model and adapters are kept for the next run")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.streams = [int(n) for n in arguments.streams.split(",")]
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    numbers = [int(n) for n in arguments.adapters.split(",")]
    if arguments.part:
        folders = make_adapters(arguments.size, arguments.models, numbers[0], arguments.rank, arguments.embeddings)
        run = {"lorry": lorry_rounds, "vllm": vllm_rounds}[arguments.part]
        run(arguments, arguments.models / arguments.size, folders)
        return

    with common.folder() as where:
        models = arguments.models or where
        if not (models / arguments.size).exists():
            make_model(arguments.size, str(models))
        make_adapters(arguments.size, models, max(numbers), arguments.rank, arguments.embeddings)
        report = common.Report("serving/throughput", common.wait_until_calm(arguments.calm))
        for engine in arguments.engines.split(","):
            if importlib.util.find_spec("vllm" if engine == "vllm" else "worker") is None:
                print(f"note: {engine} is not installed", file=sys.stderr)
                continue
            for number in numbers:
                command = [sys.executable, __file__, *sys.argv[1:], "--models", str(models), "--part", engine]
                command += ["--adapters", str(number)]
                with subprocess.Popen(
                    command, env=common.environment(where), stdout=subprocess.PIPE, text=True
                ) as part:
                    assert part.stdout is not None
                    for line in part.stdout:
                        if not line.startswith('{"figure"'):
                            continue
                        print(line, end="", flush=True)
                        figure = json.loads(line)
                        figure.pop("all", None)
                        report.add(figure.pop("figure"), figure.pop("value"), size=arguments.size, **figure)
                if part.returncode:
                    print(f"note: {engine} with {number} adapters ended with {part.returncode}", file=sys.stderr)
    for ratio in ratios(report.rows):
        report.add(**ratio)
    report.show()


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What adapters cost each engine, and the engine beside vLLM, as quotients of tokens per second."""
    rate = {(r["engine"], r["adapters"], r["streams"]): r["value"] for r in rows if "streams" in r}
    found: list[dict[str, Any]] = []
    for (engine, adapters, streams), value in rate.items():
        about = {"engine": engine, "adapters": adapters, "streams": streams}
        if adapters and (base := rate.get((engine, 0, streams))):
            found.append({"figure": "to_base_only", "value": round(value / base, 3), **about})
        if engine == "lorry" and (other := rate.get(("vllm", adapters, streams))):
            found.append({"figure": "to_vllm", "value": round(value / other, 3), **about})
    return found


if __name__ == "__main__":
    main()
