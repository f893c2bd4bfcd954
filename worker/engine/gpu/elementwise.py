"""The small operations between a decoder's matrix products, one launch each: residual + RMSNorm, rotary + cache write, SwiGLU.

Each takes the update that the step's adapters make to the product before it and adds it on the way: rows of the base
alone (owner -1) have no update and their part of it is never read.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _add_norm(
    residual, out, update, owners, weight, normed, eps,
    N: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, LORA: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    mask = i < N
    dtype = residual.dtype.element_ty
    x = tl.load(residual + row * N + i, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        y = tl.load(out + row * N + i, mask=mask, other=0.0).to(tl.float32)
        if LORA:
            mine = mask & (tl.load(owners + row) >= 0)
            y = (y + tl.load(update + row * N + i, mask=mine, other=0.0).to(tl.float32)).to(dtype).to(tl.float32)
        x = (x + y).to(dtype)
        tl.store(residual + row * N + i, x, mask=mask)
        x = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / N + eps)
    w = tl.load(weight + i, mask=mask, other=0.0).to(tl.float32)
    tl.store(normed + row * N + i, ((x * scale).to(dtype).to(tl.float32) * w).to(dtype), mask=mask)


@triton.jit
def _halves(
    x, update, mine, first, eps, norm,
    HEADS: tl.constexpr, BLOCK_H: tl.constexpr, D: tl.constexpr, BLOCK_HALF: tl.constexpr,
    NORM: tl.constexpr, LORA: tl.constexpr,
):  # fmt: skip
    """The two halves of HEADS heads from column `first`, as float32, with update and head norm."""
    h = tl.arange(0, BLOCK_H)
    i = tl.arange(0, BLOCK_HALF)
    dtype = x.dtype.element_ty
    at = first + h[:, None] * D + i[None, :]
    mask = (h < HEADS)[:, None] & (i < D // 2)[None, :]
    a = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x + at + D // 2, mask=mask, other=0.0).to(tl.float32)
    if LORA:
        a = (a + tl.load(update + at, mask=mask & mine, other=0.0).to(tl.float32)).to(dtype).to(tl.float32)
        b = (b + tl.load(update + at + D // 2, mask=mask & mine, other=0.0).to(tl.float32)).to(dtype).to(tl.float32)
    if NORM:
        scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / D + eps)[:, None]
        wa = tl.load(norm + i, mask=i < D // 2, other=0.0).to(tl.float32)[None, :]
        wb = tl.load(norm + i + D // 2, mask=i < D // 2, other=0.0).to(tl.float32)[None, :]
        a = ((a * scale).to(dtype).to(tl.float32) * wa).to(dtype).to(tl.float32)
        b = ((b * scale).to(dtype).to(tl.float32) * wb).to(dtype).to(tl.float32)
    return a, b, at, mask


@triton.jit
def _rotate_and_store(
    qkv, update, owners, positions, slots, cos, sin, keys, values, q_norm, k_norm, eps,
    HEADS: tl.constexpr, BLOCK_H: tl.constexpr, KV_HEADS: tl.constexpr, BLOCK_KV: tl.constexpr,
    D: tl.constexpr, BLOCK_HALF: tl.constexpr, NORM: tl.constexpr, LORA: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    WIDTH: tl.constexpr = (HEADS + 2 * KV_HEADS) * D
    dtype = qkv.dtype.element_ty
    x = qkv + row * WIDTH
    change = update + row * WIDTH
    mine = False
    if LORA:
        mine = tl.load(owners + row) >= 0
    position = tl.load(positions + row).to(tl.int64)
    i = tl.arange(0, BLOCK_HALF)
    c1 = tl.load(cos + position * D + i, mask=i < D // 2, other=0.0).to(tl.float32)[None, :]
    c2 = tl.load(cos + position * D + D // 2 + i, mask=i < D // 2, other=0.0).to(tl.float32)[None, :]
    s1 = tl.load(sin + position * D + i, mask=i < D // 2, other=0.0).to(tl.float32)[None, :]
    s2 = tl.load(sin + position * D + D // 2 + i, mask=i < D // 2, other=0.0).to(tl.float32)[None, :]
    a, b, at, mask = _halves(x, change, mine, 0, eps, q_norm, HEADS, BLOCK_H, D, BLOCK_HALF, NORM, LORA)
    tl.store(x + at, (a * c1 - b * s1).to(dtype), mask=mask)
    tl.store(x + at + D // 2, (b * c2 + a * s2).to(dtype), mask=mask)
    slot = tl.load(slots + row).to(tl.int64)
    cached = slot >= 0  # a padding row has no place
    a, b, at, mask = _halves(x, change, mine, HEADS * D, eps, k_norm, KV_HEADS, BLOCK_KV, D, BLOCK_HALF, NORM, LORA)
    into = slot * (KV_HEADS * D) + at - HEADS * D
    tl.store(keys + into, (a * c1 - b * s1).to(dtype), mask=mask & cached)
    tl.store(keys + into + D // 2, (b * c2 + a * s2).to(dtype), mask=mask & cached)
    FIRST: tl.constexpr = (HEADS + KV_HEADS) * D
    a, b, at, mask = _halves(x, change, mine, FIRST, eps, k_norm, KV_HEADS, BLOCK_KV, D, BLOCK_HALF, False, LORA)
    into = slot * (KV_HEADS * D) + at - FIRST
    tl.store(values + into, a.to(dtype), mask=mask & cached)
    tl.store(values + into + D // 2, b.to(dtype), mask=mask & cached)


@triton.jit
def _swiglu(gate_up, update, owners, out, N: tl.constexpr, BLOCK: tl.constexpr, LORA: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = i < N
    dtype = gate_up.dtype.element_ty
    at = row * 2 * N + i
    gate = tl.load(gate_up + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + at + N, mask=mask, other=0.0).to(tl.float32)
    if LORA:
        mine = mask & (tl.load(owners + row) >= 0)
        gate = (gate + tl.load(update + at, mask=mine, other=0.0).to(tl.float32)).to(dtype).to(tl.float32)
        up = (up + tl.load(update + at + N, mask=mine, other=0.0).to(tl.float32)).to(dtype).to(tl.float32)
    gate = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(out + row * N + i, (gate * up).to(dtype), mask=mask)


def add_norm(
    residual: torch.Tensor,
    out: torch.Tensor | None,
    update: torch.Tensor | None,
    owners: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """RMSNorm of residual + out + update, all [rows, hidden]; residual becomes that sum. Returns [rows, hidden]."""
    rows, n = residual.shape
    normed = torch.empty_like(residual)
    block = triton.next_power_of_2(n)
    _add_norm[(rows,)](
        residual, residual if out is None else out, residual if update is None else update, owners, weight, normed, eps,
        N=n, BLOCK=block, ADD=out is not None, LORA=update is not None, num_warps=min(8, max(1, block // 512)),
    )  # fmt: skip
    return normed


def rotate_and_store(
    qkv: torch.Tensor,
    update: torch.Tensor | None,
    owners: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    keys: torch.Tensor,
    values: torch.Tensor,
    head_norms: tuple[torch.Tensor, torch.Tensor, float] | None,
    heads: int,
) -> None:
    """Rotate queries in place; put rotated keys, and values, into the cache.

    qkv and update [rows, (heads + 2 kv heads) * width]; rotary: cosines and sines [positions, width]; keys, values
    [slots, kv heads, width]; `slots` int32 [rows], -1 for padding rows; head_norms: RMSNorm weights [width] of queries and
    keys and its epsilon, as in Qwen3.
    """
    kv_heads, width = keys.shape[1], keys.shape[2]
    q_norm, k_norm, eps = head_norms or (qkv, qkv, 0.0)
    _rotate_and_store[(qkv.shape[0],)](
        qkv, qkv if update is None else update, owners, positions, slots, *rotary, keys, values, q_norm, k_norm, eps,
        HEADS=heads, BLOCK_H=triton.next_power_of_2(heads), KV_HEADS=kv_heads,
        BLOCK_KV=triton.next_power_of_2(kv_heads), D=width, BLOCK_HALF=triton.next_power_of_2(width // 2),
        NORM=head_norms is not None, LORA=update is not None, num_warps=4,
    )  # fmt: skip


def swiglu(gate_up: torch.Tensor, update: torch.Tensor | None, owners: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of gate_up + update [rows, 2 n], gate first. Returns [rows, n]."""
    rows, n = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, n)
    block = min(1024, triton.next_power_of_2(n))
    _swiglu[(rows, triton.cdiv(n, block))](
        gate_up, gate_up if update is None else update, owners, out,
        N=n, BLOCK=block, LORA=update is not None, num_warps=4,
    )  # fmt: skip
    return out
