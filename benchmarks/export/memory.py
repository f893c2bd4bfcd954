"""Memory and time of a merge: lorry's, tensor by tensor, beside PEFT's merge_and_unload and save_pretrained.

Makes a random model of the shape named (1b: Llama-3.2-1B, bfloat16, tied, shards of 500 MB, 2.5 GB) and a LoRA of rank 64
on all seven projections with trained embeddings (2.3 GB), then merges them in processes of their own:

- lorry: worker.export's streamed merge to bfloat16, computed in float32;
- peft: base in bfloat16, merge_and_unload, save_pretrained (each weight rounded twice);
- peft-float32: the same with the base in float32, rounded once as lorry does it.

Memory is sampled from outside every 5 ms: anonymous memory (RssAnon) is what a process must have; VmHWM also counts the
pages of mapped files, which the kernel takes back when it needs them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.common import ROOT, Report, folder, parser, wait_until_calm

GIB = 2**30
SHAPES = {
    "tiny": (1000, 64, 128, 2, 4, 2),
    "1b": (128256, 2048, 8192, 16, 32, 8),
    "8b": (128256, 4096, 14336, 32, 32, 8),
}
WAYS = ("lorry", "peft", "peft-float32")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--shape", choices=SHAPES, default="1b")
    options.add_argument("--rank", type=int, default=64)
    options.add_argument("--shard", type=int, default=500_000_000, help="bytes a shard, of the base and of the result")
    options.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    options.add_argument("--child", nargs=3, metavar=("WAY", "FOLDER", "OUT"), help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.child:
        way, where, out = chosen.child
        print(json.dumps(child(way, Path(where), Path(out), chosen.shard)))
        return
    report = Report("export memory", wait_until_calm(chosen.calm))
    with folder() as where:
        make_base(where / "base", SHAPES[chosen.shape], chosen.shard)
        make_adapter(where / "adapter", SHAPES[chosen.shape], chosen.rank)
        peaks: dict[str, float] = {}
        for way in chosen.ways:
            figures = measure(way, where, chosen.shard)
            peaks[way] = figures["peak_anonymous_gib"]
            report.add_all(figures, way=way, shape=chosen.shape)
            shutil.rmtree(where / "out", ignore_errors=True)
        for way in peaks if "lorry" in peaks else ():
            if way != "lorry":
                ratio = round(peaks["lorry"] / peaks[way], 3)
                report.add("peak_anonymous_ratio", ratio, way=f"lorry / {way}", shape=chosen.shape)
    report.show()


def measure(way: str, where: Path, shard: int) -> dict[str, float]:
    """Run one way in a process of its own and watch its memory."""
    out = where / "out"
    out.mkdir()
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--shard", str(shard), "--child", way, str(where), str(out)]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    peak = high = 0
    while process.poll() is None:
        try:
            status = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
            peak = max(peak, int(status.get("RssAnon", "0 kB").split()[0]))
            high = max(high, int(status.get("VmHWM", "0 kB").split()[0]))
        except (OSError, ValueError):
            pass
        time.sleep(0.005)
    if process.returncode:
        raise SystemExit(f"{way} failed with {process.returncode}")
    assert process.stdout is not None
    told = json.loads(process.stdout.read().splitlines()[-1])
    return {
        "peak_anonymous_gib": round(peak * 1024 / GIB, 3),
        "of_it_before_the_merge_gib": round(told["before"] / GIB, 3),
        "vm_hwm_gib": round(high * 1024 / GIB, 3),
        "merge_seconds": round(told["seconds"], 1),
        "written_gib": round(sum(p.stat().st_size for p in out.iterdir()) / GIB, 3),
    }


def child(way: str, where: Path, out: Path, shard: int) -> dict[str, float]:
    """Merge one way; seconds and the anonymous memory (bytes) after the imports."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from worker.export import merge_stream, plan, weights

    before = anonymous()
    begin = time.perf_counter()
    if way == "lorry":
        base = weights.open_base(str(where / "base"), revision=None, token=None)
        planned = plan.plan_merge(base, where / "adapter", plan.skeleton(base, trust_remote_code=False))
        merge_stream.write_merged(
            base, where / "adapter", planned, out, shard_bytes=shard, step=lambda done, total: None
        )
    else:
        dtype = torch.float32 if way == "peft-float32" else torch.bfloat16
        model: Any = AutoModelForCausalLM.from_pretrained(where / "base", dtype=dtype)
        merged = PeftModel.from_pretrained(model, where / "adapter").merge_and_unload()
        merged.to(torch.bfloat16).save_pretrained(out, max_shard_size=shard)
    return {"before": before, "seconds": time.perf_counter() - begin}


def anonymous() -> int:
    """This process's anonymous memory, in bytes."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def layers(shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, int]]]:
    """The seven projections of each layer: module name, [out, in]."""
    _, hidden, intermediate, n, heads, kv_heads = shape
    kv = hidden // heads * kv_heads
    sizes = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (intermediate, hidden), "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }  # fmt: skip
    for i in range(n):
        for name, size in sizes.items():
            yield f"model.layers.{i}.{name}", size


def make_base(out: Path, shape: tuple[int, ...], shard: int) -> None:
    """Write a random tied Llama in bfloat16."""
    import torch
    from transformers import LlamaConfig

    vocabulary, hidden, intermediate, n, heads, kv_heads = shape
    LlamaConfig(
        architectures=["LlamaForCausalLM"], vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate,
        num_hidden_layers=n, num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=True,
        dtype=torch.bfloat16,
    ).save_pretrained(out)  # fmt: skip
    sizes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    sizes |= {f"{name}.weight": size for name, size in layers(shape)}
    for i in range(n):
        sizes |= {
            f"model.layers.{i}.{norm}.weight": (hidden,) for norm in ("input_layernorm", "post_attention_layernorm")
        }
    write(out, sizes | {"model.norm.weight": (hidden,)}, torch.bfloat16, 0.02, shard)


def make_adapter(out: Path, shape: tuple[int, ...], rank: int) -> None:
    """Write a random LoRA on all projections with both embeddings trained, in float32."""
    import torch
    from peft import LoraConfig

    names = sorted({name.rsplit(".", 1)[1] for name, _ in layers(shape)})
    LoraConfig(
        r=rank, lora_alpha=2 * rank, use_rslora=True, target_modules=names, modules_to_save=["embed_tokens", "lm_head"],
        task_type="CAUSAL_LM",
    ).save_pretrained(str(out))  # fmt: skip
    prefix = "base_model.model."
    sizes: dict[str, tuple[int, ...]] = {f"{prefix}{n}.weight": shape[:2] for n in ("model.embed_tokens", "lm_head")}
    for name, (rows, columns) in layers(shape):
        sizes |= {f"{prefix}{name}.lora_A.weight": (rank, columns), f"{prefix}{name}.lora_B.weight": (rows, rank)}
    write(out, sizes, torch.float32, 0.01, 10**15)
    os.rename(out / "model.safetensors", out / "adapter_model.safetensors")


def write(out: Path, sizes: dict[str, tuple[int, ...]], dtype: Any, size: float, shard: int) -> None:
    import torch

    from worker.export.shards import Entry, write_model

    generator = torch.Generator().manual_seed(0)
    # One block of noise, again and again: making 5 GB of it would take longer than the merge.
    noise = torch.randn(1 << 22, generator=generator).mul_(size).to(dtype)

    def pieces(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, Any]]:
        left = torch.Size(shape).numel()
        while left:
            yield name, noise[:left]
            left -= min(left, noise.numel())

    groups = [[Entry(name, shape, dtype)] for name, shape in sizes.items()]
    write_model(groups, (pieces(n, s) for n, s in sizes.items()), out, shard_bytes=shard)


if __name__ == "__main__":
    main()
