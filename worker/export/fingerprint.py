"""A merge is checked against PEFT's own, weight by weight, without holding two models: by projections of each matrix.

KL alone cannot do it: an adapter that changes little may be left out and nobody would see it in 16 rows.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from typing import Any

import torch

from worker.export import nf4
from worker.export.plan import Planned
from worker.export.weights import BaseWeights

# Largest relative difference of a tensor's projection. The same arithmetic gives 0; another order of summation flips
# the 16-bit rounding of some weights in 100,000, which is about 3e-5. A LoRA that 16 bits can hold at all moves a
# matrix by more than their step, 4e-3.
TOLERANCE = 2e-4


def project(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A matrix times a fixed random vector of ±1: [rows], float32, on the CPU. A vector is its own projection."""
    if tensor.dim() < 2:
        return tensor.float().cpu()
    matrix = tensor.reshape(tensor.shape[0], -1)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    signs = torch.randint(0, 2, (matrix.shape[1],), generator=generator).float() * 2 - 1
    out = [block.float() @ signs.to(block.device) for block in matrix.split(max(1, (1 << 24) // matrix.shape[1]))]
    return torch.cat(out).cpu()


def of_peft(
    live: Any, tensors: Iterable[Planned], quantize: Callable[[Planned], bool], step: Callable[[], None]
) -> dict[str, torch.Tensor]:
    """Projections of what PEFT's merge_and_unload gives, rounded as planned. `live` is used up."""
    state = live.merge_and_unload().state_dict()
    how = nf4.Quantization("nf4", True, torch.float32)
    out: dict[str, torch.Tensor] = {}
    for planned in tensors:
        step()
        if planned.name not in state or not planned.dtype.is_floating_point:
            continue
        exact = state[planned.name]
        out[planned.name] = project(
            planned.name, nf4.round_trip(exact, how) if quantize(planned) else exact.to(planned.dtype)
        )
    return out


def compare(files: BaseWeights, expected: dict[str, torch.Tensor], step: Callable[[], None]) -> dict[str, Any]:
    """Project what stands in the files and compare: how many tensors, the largest relative difference and whose it is."""
    worst, name = 0.0, None
    for key, there in expected.items():
        step()
        if key not in files.tensors:
            return {"tensors": len(expected), "largest_difference": float("inf"), "tensor": key}
        here = project(key, files.read(key, torch.device("cpu")))
        difference = (
            float((here - there).norm() / there.norm().clamp(min=1e-12)) if here.shape == there.shape else float("inf")
        )
        if not difference <= worst:
            worst, name = difference, key
    files.close()
    return {"tensors": len(expected), "largest_difference": worst, "tensor": name}
