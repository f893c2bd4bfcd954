"""What worker/split_weights.py does to each slice, in one kernel before the optimiser's and one after it.

As tensor operations each slice takes over twenty passes through memory and as many launches, which made a step of the
1B shape some 20 ms longer. The same integer arithmetic as `split` and `join`, so the same bits.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 2048


@triton.jit
def _join(
    high, low, gradient, scale, weights, gradients, count, SCALED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    top = tl.load(high + at, mask=inside, other=0.0).to(tl.int16, bitcast=True).to(tl.int32)
    bits = (top << 16) + tl.load(low + at, mask=inside, other=0).to(tl.int32)
    tl.store(weights + at, bits.to(tl.float32, bitcast=True), mask=inside)
    g = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        g = g * tl.load(scale)
    tl.store(gradients + at, g, mask=inside)


@triton.jit
def _split(weights, high, low, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    w = tl.load(weights + at, mask=inside, other=0.0)
    bits = tl.where(w != w, 0x7FC00000, w.to(tl.int32, bitcast=True))
    top = (bits + 0x8000) >> 16
    tl.store(high + at, top.to(tl.int16).to(tl.bfloat16, bitcast=True), mask=inside)
    tl.store(low + at, (bits - (top << 16)).to(tl.int16), mask=inside)


def join_slice(
    high: torch.Tensor, low: torch.Tensor, gradient: torch.Tensor, scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """bfloat16, int16 and a gradient, each [n] → float32 weights and scaled float32 gradient, each [n]."""
    weights = torch.empty(high.shape, dtype=torch.float32, device=high.device)
    gradients = torch.empty_like(weights)
    grid = (triton.cdiv(high.numel(), _BLOCK),)
    _join[grid](
        high,
        low,
        gradient,
        high if scale is None else scale,
        weights,
        gradients,
        high.numel(),
        scale is not None,
        _BLOCK,
    )
    return weights, gradients


def split_slice(weights: torch.Tensor, high: torch.Tensor, low: torch.Tensor) -> None:
    """float32 [n] → `high` and `low`, in place."""
    _split[(triton.cdiv(weights.numel(), _BLOCK),)](weights, high, low, weights.numel(), _BLOCK)
