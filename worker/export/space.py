"""Whether an export will fit on the disk, asked before its work begins."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import torch

from service.errors import JobFailure
from service.specs import ExportSpec
from worker.export import nf4
from worker.export.reference import EFFECT_ROWS
from worker.export.source import Source

RESERVE = 64 * 2**20  # tokenizer, template, card, the file system's own
BITS = {"f32": 32.0, "f16": 16.0, "bf16": 16.0}


def needed_bytes(spec: ExportSpec, source: Source, probe: list[list[int]]) -> int:
    """The most that the export will take while it is made: its files, intermediates, the live adapter's answers."""
    tensors = source.plan.tensors
    merged = 0
    for p in tensors:
        in_nf4 = spec.format == "merged_4bit" and p.linear
        merged += (
            sum(e.bytes for e in nf4.entries(p.name, p.shape))
            if in_nf4
            else torch.Size(p.shape).numel() * p.dtype.itemsize
        )
    adapter = sum(p.stat().st_size for p in source.adapter.iterdir() if p.is_file())
    parameters = sum(torch.Size(p.shape).numel() for p in tensors)
    files = adapter if spec.format == "lora" else merged
    if spec.format == "gguf":
        # The merged model, what it is converted to in the same type, and each file.
        files = 2 * merged + sum(int(parameters * bits(m) / 8) for m in spec.methods)
    elif spec.methods:
        files += len(spec.methods) * adapter + (2 * merged if spec.verify else 0)  # the base as GGUF, to try them on
    vocabulary = max((p.shape[0] for p in tensors if len(p.shape) == 2), default=0)
    return files + 4 * vocabulary * sum(len(row) for row in [*probe, *probe[:EFFECT_ROWS]]) + RESERVE


def bits(method: str) -> float:
    """About how many bits a weight takes in a GGUF type: its name's number, and one for scales and mixtures."""
    number = re.search(r"\d", method)
    return BITS.get(method, float(number[0]) + 1.0 if number else 16.0)


def check_space(spec: ExportSpec, source: Source, out_dir: Path, probe: list[list[int]]) -> None:
    """Raise JobFailure("insufficient_storage") naming what is needed and what is free."""
    needed, free = needed_bytes(spec, source, probe), shutil.disk_usage(out_dir.parent).free
    if needed > free:
        raise JobFailure(
            "insufficient_storage",
            f"the export needs {needed:,} bytes on the data folder's disk, {free:,} are free",
        )
