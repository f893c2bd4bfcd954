"""Merging without a model in memory: tensor by tensor, in float32, rounded once, straight into the shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from service.errors import JobFailure
from worker import adapter_io
from worker.export import nf4
from worker.export.plan import Plan, Planned
from worker.export.shards import Entry, write_model
from worker.export.weights import BaseWeights

CHUNK = 1 << 22  # elements computed at a time: 16 MiB in float32


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def write_merged(
    base: BaseWeights,
    adapter: Path,
    plan: Plan,
    folder: Path,
    *,
    shard_bytes: int,
    step: Callable[[int, int], None],
    trained_on: Callable[[str], nf4.Quantization | None] = lambda name: None,
    quantize: Callable[[Planned], bool] = lambda planned: False,
) -> list[Path]:
    """Compute and write the planned tensors; memory is one tensor of the base plus a few chunks.

    `trained_on` says of a base tensor in 16 bits how training held it in 4 bits: it is rounded the same way first.
    `quantize` says which of the merged tensors are stored in NF4. `step(done, total)` is called between chunks and may
    raise. Raises JobFailure("export_mismatch") for values that are not finite.
    """
    total = len(plan.tensors)
    groups = [nf4.entries(p.name, p.shape) if quantize(p) else [Entry(p.name, p.shape, p.dtype)] for p in plan.tensors]

    with ExitStack() as stack:
        weights = stack.enter_context(safe_open(adapter / adapter_io.WEIGHTS, framework="pt"))
        stack.callback(base.close)

        def pieces(number: int, planned: Planned) -> Iterator[tuple[str, torch.Tensor]]:
            step(number, total)
            values = merged(base, weights, planned, trained_on)
            if quantize(planned):
                whole = torch.cat([v.float() for v in values])
                check_finite(planned, whole.to(planned.dtype))
                yield from nf4.pieces(planned.name, whole, planned.dtype)
                return
            for chunk in values:
                out = chunk.to(planned.dtype)
                check_finite(planned, out)
                yield planned.name, out.cpu()
                step(number, total)

        data = (pieces(i, planned) for i, planned in enumerate(plan.tensors))
        paths = write_model(groups, data, folder, shard_bytes=shard_bytes)
    step(total, total)
    return paths


def check_finite(planned: Planned, values: torch.Tensor) -> None:
    """Raise JobFailure("export_mismatch") for values that the type they are stored or scaled in does not hold."""
    if values.is_floating_point() and not torch.isfinite(values).all():
        kind = str(planned.dtype)[6:]
        raise JobFailure("export_mismatch", f"{planned.name}: values beyond the range of {kind} after merging")


def merged(
    base: BaseWeights, adapter: Any, planned: Planned, trained_on: Callable[[str], nf4.Quantization | None]
) -> Iterator[torch.Tensor]:
    """A tensor's values by blocks of rows: float32 where something is added, else as stored."""
    where = device()
    if planned.trained is not None:
        values = adapter.get_tensor(planned.trained)
    else:
        assert planned.source is not None
        values = base.read(planned.source, where)
        quantization = trained_on(planned.source) if values.is_floating_point() else None
        if quantization is not None and not base.tensors[planned.source].parts:
            values = nf4.round_trip(values.to(where), quantization)
    if values.dim() < 2:
        yield values
        return
    a = b = None
    if planned.lora is not None:
        a = adapter.get_tensor(planned.lora.a).to(where, torch.float32)
        b = adapter.get_tensor(planned.lora.b).to(where, torch.float32)
    rows = max(1, CHUNK // max(1, values[0].numel()))
    for i in range(0, values.shape[0], rows):
        block = values[i : i + rows].to(where)
        if a is not None and b is not None and planned.lora is not None:
            block = (b[i : i + rows] @ a).mul_(planned.lora.scaling).add_(block)
        yield block
