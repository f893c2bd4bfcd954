"""Attention that reads paged keys and values where they lie, through block tables: nothing is gathered into copies.

Decodes split a sequence over several programs where the batch alone does not fill the device, and join the parts by their
log-sum-exp (flash-decoding, Dao et al. 2023); the query heads of a group share one read of their keys. Chunks of prompts
run tiles of queries over the cache (FlashAttention-2, Dao 2023), the chunk's own keys included.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl

QUERY_TILE = 64  # rows of a chunk that one program attends for
_PROGRAMS = 528  # four for each multiprocessor of an H100; beyond it a further split only costs


def splits_for(rows: int, kv_heads: int) -> int:
    """Parts into which each decoding sequence is split: a power of two, fewer the larger the batch."""
    wanted = max(1, _PROGRAMS // (rows * kv_heads))
    return min(32, 1 << (wanted.bit_length() - 1))


@triton.jit(do_not_specialize=["table_width"])
def _decode(
    q, keys, values, out, part, lse, tables, lengths, scale, window, q_stride, table_width,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, BLOCK_G: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    length = tl.load(lengths + row)
    first = tl.maximum(length - window, 0) if WINDOW else 0
    chunk = tl.cdiv(tl.cdiv(length - first, SPLITS), BLOCK_N) * BLOCK_N
    begin = first + split * chunk
    end = tl.minimum(length, begin + chunk)
    g = tl.arange(0, BLOCK_G)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    heads = head * GROUP + g
    qs = tl.load(
        q + row.to(tl.int64) * q_stride + heads[:, None] * D + d[None, :],
        mask=(g < GROUP)[:, None] & (d < D)[None, :],
        other=0.0,
    )
    best = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_DV], tl.float32)
    for at in range(begin, end, BLOCK_N):
        n = at + tl.arange(0, BLOCK_N)
        seen = n < end
        page = tl.load(tables + row * table_width + n // PAGE, mask=seen, other=0)
        slot = page.to(tl.int64) * PAGE + n % PAGE
        k = tl.load(
            keys + slot[None, :] * (KV_HEADS * D) + head * D + d[:, None],
            mask=seen[None, :] & (d < D)[:, None],
            other=0.0,
        )
        s = tl.dot(qs, k, input_precision="ieee") * scale
        s = tl.where(seen[None, :], s, float("-inf"))
        top = tl.maximum(best, tl.max(s, 1))
        p = tl.exp2(s - top[:, None])
        shrink = tl.exp2(best - top)
        v = tl.load(
            values + slot[:, None] * (KV_HEADS * DV) + head * DV + dv[None, :],
            mask=seen[:, None] & (dv < DV)[None, :],
            other=0.0,
        )
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        total = total * shrink + tl.sum(p, 1)
        best = top
    mask = (g < GROUP)[:, None] & (dv < DV)[None, :]
    at = row.to(tl.int64) * HEADS + heads
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    if SPLITS == 1:
        tl.store(out + at[:, None] * DV + dv[None, :], acc.to(out.dtype.element_ty), mask=mask)
    else:
        tl.store(part + (at[:, None] * SPLITS + split) * DV + dv[None, :], acc, mask=mask)
        tl.store(lse + at * SPLITS + split, tl.where(total > 0, best + tl.log2(total), float("-inf")), mask=g < GROUP)


@triton.jit
def _join(part, lse, out, DV: tl.constexpr, BLOCK_DV: tl.constexpr, SPLITS: tl.constexpr):
    at = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, SPLITS)
    dv = tl.arange(0, BLOCK_DV)
    logs = tl.load(lse + at * SPLITS + s)
    known = logs > float("-inf")
    top = tl.max(logs, 0)
    weights = tl.where(known, tl.exp2(logs - top), 0.0)
    parts = tl.load(
        part + (at * SPLITS + s)[:, None] * DV + dv[None, :], mask=known[:, None] & (dv < DV)[None, :], other=0.0
    )
    total = tl.sum(weights, 0)
    o = tl.sum(parts * weights[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out + at * DV + dv, o.to(out.dtype.element_ty), mask=dv < DV)


@triton.jit(do_not_specialize=["table_width"])
def _chunk(
    q, keys, values, out, tables, tiles, scale, window, q_stride, table_width,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    tile, head = tl.program_id(0), tl.program_id(1)
    start = tl.load(tiles + tile * 4)
    stop = tl.load(tiles + tile * 4 + 1)
    sequence = tl.load(tiles + tile * 4 + 2)
    position = tl.load(tiles + tile * 4 + 3)
    kv_head = head // (HEADS // KV_HEADS)
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    rows = (start + m).to(tl.int64)
    real = start + m < stop
    qs = tl.load(q + rows[:, None] * q_stride + head * D + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0)
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    begin = (tl.maximum(position - window + 1, 0) // BLOCK_N) * BLOCK_N if WINDOW else 0
    end = position + (stop - start)
    for at in range(begin, end, BLOCK_N):
        n = at + tl.arange(0, BLOCK_N)
        page = tl.load(tables + sequence * table_width + n // PAGE, mask=n < end, other=0)
        slot = page.to(tl.int64) * PAGE + n % PAGE
        k = tl.load(
            keys + slot[None, :] * (KV_HEADS * D) + kv_head * D + d[:, None],
            mask=(n < end)[None, :] & (d < D)[:, None],
            other=0.0,
        )
        s = tl.dot(qs, k, input_precision="ieee") * scale
        seen = n[None, :] <= (position + m)[:, None]
        if WINDOW:
            seen &= n[None, :] > (position + m - window)[:, None]
        s = tl.where(seen & (n < end)[None, :], s, float("-inf"))
        top = tl.maximum(best, tl.max(s, 1))
        safe = tl.where(top > float("-inf"), top, 0.0)  # a row whose window begins after this tile
        p = tl.exp2(s - safe[:, None])
        shrink = tl.exp2(best - safe)
        v = tl.load(
            values + slot[:, None] * (KV_HEADS * DV) + kv_head * DV + dv[None, :],
            mask=(n < end)[:, None] & (dv < DV)[None, :],
            other=0.0,
        )
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        total = total * shrink + tl.sum(p, 1)
        best = top
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(
        out + (rows[:, None] * HEADS + head) * DV + dv[None, :],
        acc.to(out.dtype.element_ty),
        mask=real[:, None] & (dv < DV)[None, :],
    )


_LOG2E = 1.4426950408889634  # the kernels work with powers of two


def decode_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    *,
    heads: int,
    scale: float,
    window: int | None,
    page: int,
    splits: int | None = None,
) -> None:
    """Attention of one new token a sequence over all its tokens, itself included.

    q [rows, ≥ heads * width], its heads first in each row; keys, values [slots, kv heads, width]; out [≥ rows, heads *
    value width], written; tables int32 [≥ rows, blocks]; lengths int32 [rows], 0 for a padding row, which gets zeros.
    """
    rows, kv_heads, width, value_width = lengths.shape[0], keys.shape[1], keys.shape[2], values.shape[2]
    splits = splits or splits_for(rows, kv_heads)
    part = lse = out  # unused without splits
    if splits > 1:
        part = torch.empty(rows, heads, splits, value_width, dtype=torch.float32, device=q.device)
        lse = torch.empty(rows, heads, splits, dtype=torch.float32, device=q.device)
    block_dv = triton.next_power_of_2(value_width)
    _decode[(rows, kv_heads, splits)](
        q, keys, values, out, part, lse, tables, lengths, scale * _LOG2E, window or 0, q.stride(0), tables.stride(0),
        HEADS=heads, KV_HEADS=kv_heads, BLOCK_G=max(16, triton.next_power_of_2(heads // kv_heads)),
        D=width, BLOCK_D=max(16, triton.next_power_of_2(width)), DV=value_width, BLOCK_DV=max(16, block_dv),
        PAGE=page, BLOCK_N=32 if splits > 4 else 64, SPLITS=splits, WINDOW=window is not None, num_warps=4,
    )  # fmt: skip
    if splits > 1:
        _join[(rows * heads,)](part, lse, out, DV=value_width, BLOCK_DV=block_dv, SPLITS=splits, num_warps=1)


def chunk_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
    tables: torch.Tensor,
    tiles: torch.Tensor,
    *,
    heads: int,
    scale: float,
    window: int | None,
    page: int,
) -> None:
    """Causal attention of chunks of prompts over all that comes before them, and themselves.

    As `decode_attention`, but tiles int32 [n, 4] say whose rows run: first and last + 1 packed row (at most QUERY_TILE of
    them), row of `tables`, and position of the first row in its sequence. The chunk's keys are in the cache already.
    """
    kv_heads, width, value_width = keys.shape[1], keys.shape[2], values.shape[2]
    wide = q.element_size() * width > 256  # float32 or very wide heads: smaller tiles, or shared memory does not do
    _chunk[(tiles.shape[0], heads)](
        q, keys, values, out, tables, tiles, scale * _LOG2E, window or 0, q.stride(0), tables.stride(0),
        HEADS=heads, KV_HEADS=kv_heads, D=width, BLOCK_D=max(16, triton.next_power_of_2(width)),
        DV=value_width, BLOCK_DV=max(16, triton.next_power_of_2(value_width)), PAGE=page,
        BLOCK_M=QUERY_TILE, BLOCK_N=32 if wide else 64, WINDOW=window is not None,
        num_warps=4, num_stages=1 if wide else 3,
    )  # fmt: skip
