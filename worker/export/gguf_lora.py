"""An adapter as GGUF LoRA: llama.cpp's converter, and the proof on the base as GGUF in llama.cpp itself."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open

from service.errors import JobFailure
from service.specs import ExportSpec
from service.templates import StoredTemplate
from worker import adapter_io
from worker.export import folder as folders
from worker.export import gguf, llama_cpp
from worker.export.gguf_ollama import write_modelfile
from worker.export.gguf_types import tensor_types
from worker.export.llama_cpp import Tools
from worker.export.merge_stream import write_merged
from worker.export.reference import Reference
from worker.export.source import Source
from worker.files import write_json

ROWS, POSITIONS = 4, 8  # of the probe: each position is one request that answers with the whole vocabulary
LIMIT = 1e-2  # mean KL (nats): the base's rounding to 16 bits, and the adapter's to its type
TYPES = {"f32": {"F32"}, "f16": {"F16", "F32"}, "bf16": {"BF16", "F32"}, "q8_0": {"Q8_0", "F16", "F32"}}


def file_name(name: str, method: str) -> str:
    return f"{name}-lora-{method.upper()}.gguf"


def alpha(source: Source) -> float:
    """The one lora_alpha from which llama.cpp's alpha / r is every matrix's own factor, rsLoRA's too.

    Raises JobFailure("unsupported") for an adapter that a GGUF LoRA cannot hold: fully trained tensors, such as
    embeddings or biases, or factors that differ in more than the rank.
    """
    trained = [p.name for p in source.plan.tensors if p.trained]
    if trained:
        raise JobFailure(
            "unsupported",
            f"quantization_method: a GGUF LoRA holds no fully trained tensors, and this adapter has {', '.join(trained)}; "
            "use format gguf",
        )
    with safe_open(source.adapter / adapter_io.WEIGHTS, framework="pt") as file:
        found = {
            round(p.lora.scaling * file.get_slice(p.lora.a).get_shape()[0], 9) for p in source.plan.tensors if p.lora
        }
    if len(found) != 1:
        raise JobFailure("unsupported", "quantization_method: a GGUF LoRA has one lora_alpha, this adapter has several")
    return float(found.pop())


def write(
    source: Source,
    spec: ExportSpec,
    stored: StoredTemplate,
    out: Path,
    aside: Path,
    *,
    tools: Tools,
) -> list[Path]:
    """Write the adapter as GGUF LoRA in each type, with a Modelfile beside each; returns the GGUF files."""
    staged, base = aside / "peft", aside / "base-config"
    staged.mkdir()
    base.mkdir()
    (staged / adapter_io.WEIGHTS).symlink_to((source.adapter / adapter_io.WEIGHTS).absolute())
    config = json.loads((source.adapter / adapter_io.CONFIG).read_text("utf-8"))
    # The converter reads lora_alpha and nothing else: not that rsLoRA divides by the root of r.
    write_json(staged / adapter_io.CONFIG, {**config, "lora_alpha": alpha(source), "use_rslora": False})
    write_json(base / "config.json", {k: v for k, v in source.base.config.items() if k != "quantization_config"})
    files = [out / file_name(spec.adapter, method) for method in spec.methods]
    outputs = [[str(file), method] for file, method in zip(files, spec.methods, strict=True)]
    llama_cpp.run("convert_lora", {"folder": str(staged), "base": str(base), "outputs": outputs}, tools)
    for file in files:
        write_modelfile(file, stored, gguf.context_length(base), lora=True)
    return files


def read_back(
    folder: Path,
    source: Source,
    spec: ExportSpec,
    stored: StoredTemplate,
    expected: Reference,
    aside: Path,
    *,
    tokenizer: Any,
    tools: Tools,
    step: Callable[[int, int], None],
) -> dict[str, Any]:
    """Load each file on the base as GGUF in llama.cpp and compare a few positions over the whole vocabulary.

    Returns {reader, files: [{file, method, tensor_types, positions, mean_kl, argmax_agreement, adapter_carried, limit}],
    problems}.
    """
    base = aside / "base.gguf"
    _write_base(source, stored, base, aside / "base", tokenizer=tokenizer, tools=tools)
    asked = []
    for i, row in enumerate(expected.ids[:ROWS]):
        for at in sorted({(len(row) - 1) * k // POSITIONS for k in range(1, POSITIONS + 1)}):
            asked.append([row[: at + 1], str(expected.folder / f"{i}.npy"), at, str(expected.folder / f"base-{i}.npy")])
    context = max(len(row) for row in expected.ids) + 8
    reports, problems = [], []
    for number, method in enumerate(spec.methods):
        file = folder / file_name(spec.adapter, method)
        request = {"file": str(base), "lora": str(file), "context": context, "calls": [], "positions": asked}
        sums = llama_cpp.run("serve", request, tools)
        kl, carried = sum(line["kl"] for line in sums) / len(sums), gguf.carried(sums)
        report = {
            "file": file.name,
            "method": method,
            "tensor_types": tensor_types(file),
            "positions": len(sums),
            "mean_kl": kl,
            "argmax_agreement": sum(line["same"] for line in sums) / len(sums),
            "adapter_carried": carried,
            "limit": LIMIT,
        }
        reports.append(report)
        if not set(report["tensor_types"]) <= TYPES[method]:
            problems.append(f"{file.name}: tensors in {', '.join(report['tensor_types'])}, asked for {method}")
        if not kl <= LIMIT:
            problems.append(f"{file.name}: mean KL {kl:.3g} over the limit {LIMIT:g}")
        problems += [f"{file.name}: {problem}" for problem in gguf.carried_problems(carried, kl, expected.effect)]
        step(number + 1, len(spec.methods))
    return {"reader": f"llama.cpp ({tools.reader})", "files": reports, "problems": problems}


def _write_base(
    source: Source, stored: StoredTemplate, out: Path, folder: Path, *, tokenizer: Any, tools: Tools
) -> None:
    """The base alone, as training held it, as a GGUF file in its own 16-bit type."""
    folder.mkdir()
    bare = [dataclasses.replace(planned, lora=None) for planned in source.plan.tensors]
    plan = dataclasses.replace(source.plan, tensors=bare)
    write_merged(
        source.base,
        source.adapter,
        plan,
        folder,
        shard_bytes=10**10,
        step=lambda done, total: None,
        trained_on=source.trained_on,
    )
    folders.write_configs(source.base, plan, source.model, folder, dtype=source.dtype, ends=[])
    tokenizer.save_pretrained(folder)
    gguf.convert(folder, out, gguf.stored_type(folder), name="base", template=stored, tokenizer=tokenizer, tools=tools)
