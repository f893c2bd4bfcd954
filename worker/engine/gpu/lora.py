"""Products with the updates of many adapters in one launch, after Punica (Chen et al. 2023) and S-LoRA (Sheng et al. 2023).

Rows of the same adapter stand together and fall into tiles; a tile's programs read its adapter's matrices through a table of
addresses, so that an adapter's weights lie where they were loaded, in their own rank, and are read once a tile. Of the
programs of a launch the first shrink (x A), the last expand (… B) what those have left in memory, and wait for them by a
counter: the device starts programs in order, so that what is waited for is always under way. Between them, where rows are
few, stand those of the base's product, which has the memory's whole bandwidth to itself meanwhile. Sums are split into parts
that are added in a fixed order: no atomics on values, the same bits every time.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl

MAX_RANK = 256  # an adapter of a higher rank runs through the eager sites
FEW_ROWS = 16  # up to which the base's product is a part of the launch; beyond, cuBLAS is faster
_RANKS = 64  # of a program at a time


@triton.jit
def _shrink(
    x, tiles, addresses, ranks, part, done, site, sites, rows, x_stride, pid,
    K: tl.constexpr, SPLIT: tl.constexpr, SPLITS: tl.constexpr, SUBS: tl.constexpr, MAX: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    split = pid % SPLITS
    sub = (pid // SPLITS) % SUBS
    tile = pid // (SPLITS * SUBS)
    slot = tl.load(tiles + tile * 3 + 2)
    if slot >= 0:
        rank = tl.load(ranks + slot * sites + site + sub)
        start = tl.load(tiles + tile * 3)
        stop = tl.load(tiles + tile * 3 + 1)
        address = tl.load(addresses + (slot * 2) * sites + site + sub)
        a = tl.multiple_of(address.to(tl.pointer_type(x.dtype.element_ty)), 16)
        m = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
        for first in range(0, rank, BLOCK_R):
            r = first + tl.arange(0, BLOCK_R)
            acc = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
            for k0 in range(split * SPLIT, min(split * SPLIT + SPLIT, K), BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K)
                xs = tl.load(
                    x + m[:, None] * x_stride + k[None, :], mask=(m < stop)[:, None] & (k < K)[None, :], other=0.0
                )
                w = tl.load(a + r[None, :] * K + k[:, None], mask=(r < rank)[None, :] & (k < K)[:, None], other=0.0)
                acc = tl.dot(xs, w, acc, input_precision="ieee")
            to = part + ((split * rows + m) * SUBS + sub)[:, None] * MAX + r[None, :]
            tl.store(to, acc, mask=(m < stop)[:, None] & (r < rank)[None, :])
        tl.debug_barrier()  # every thread's part is written before the counter says so
        tl.atomic_add(done + tile * SUBS + sub, 1, sem="release")


@triton.jit
def _product(
    x, weight, bias, out, rows, x_stride, pid,
    K: tl.constexpr, N: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m = tl.arange(0, BLOCK_M)
    n = pid * BLOCK_N + tl.arange(0, BLOCK_N)
    n64 = n.to(tl.int64)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        w = tl.load(weight + n64[None, :] * K + k[:, None], mask=(n < N)[None, :] & (k < K)[:, None], other=0.0)
        xs = tl.load(x + m[:, None] * x_stride + k[None, :], mask=(m < rows)[:, None] & (k < K)[None, :], other=0.0)
        acc = tl.dot(xs, w, acc, input_precision="ieee")
    if BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out + m[:, None] * N + n[None, :], acc.to(out.dtype.element_ty), mask=(m < rows)[:, None] & (n < N)[None, :]
    )


@triton.jit
def _expand(
    tiles, addresses, ranks, scalings, part, done, update, site, sites, rows, tile, block,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, SPLITS: tl.constexpr, SUBS: tl.constexpr, MAX: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    slot = tl.load(tiles + tile * 3 + 2)
    if slot >= 0:
        B0: tl.constexpr = (N0 + BLOCK_N - 1) // BLOCK_N
        B1: tl.constexpr = (N1 + BLOCK_N - 1) // BLOCK_N
        sub = (block >= B0).to(tl.int32) + (block >= B0 + B1).to(tl.int32)
        width = tl.where(sub == 0, N0, tl.where(sub == 1, N1, N2))
        column = tl.where(sub == 0, 0, tl.where(sub == 1, N0, N0 + N1))
        block = block - tl.where(sub == 0, 0, tl.where(sub == 1, B0, B0 + B1))
        # The widths are multiples of 16: loads and stores are wide.
        width = tl.multiple_of(width, 8)
        column = tl.multiple_of(column, 8)
        start = tl.load(tiles + tile * 3)
        stop = tl.load(tiles + tile * 3 + 1)
        rank = tl.load(ranks + slot * sites + site + sub)
        scaling = tl.load(scalings + slot * sites + site + sub)
        address = tl.load(addresses + (slot * 2 + 1) * sites + site + sub)
        b = tl.multiple_of(address.to(tl.pointer_type(update.dtype.element_ty)), 16)
        m = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
        n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        r = tl.arange(0, BLOCK_R)
        # Before the wait: this does not depend on what is waited for.
        w = tl.load(b + r[:, None] * width + n[None, :], mask=(r < rank)[:, None] & (n < width)[None, :], other=0.0)
        while tl.atomic_add(done + tile * SUBS + sub, 0, sem="acquire") < SPLITS:
            pass
        tl.debug_barrier()
        acc = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
        for first in range(0, rank, BLOCK_R):
            if first > 0:
                r = first + tl.arange(0, BLOCK_R)
                w = tl.load(
                    b + r[:, None] * width + n[None, :], mask=(r < rank)[:, None] & (n < width)[None, :], other=0.0
                )
            mask = (m < stop)[:, None] & (r < rank)[None, :]
            s = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
            for split in tl.static_range(SPLITS):
                at = part + ((split * rows + m) * SUBS + sub)[:, None] * MAX + r[None, :]
                s += tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
            acc = tl.dot(s.to(w.dtype), w, acc, input_precision="ieee")
        to = update + m[:, None] * (N0 + N1 + N2) + (column + n)[None, :]
        tl.store(to, (acc * scaling).to(update.dtype.element_ty), mask=(m < stop)[:, None] & (n < width)[None, :])


@triton.jit(do_not_specialize=["site", "sites", "tile_count", "rows"], do_not_specialize_on_alignment=["done"])
def _project(
    x, weight, bias, out, tiles, addresses, ranks, scalings, part, done, update, site, sites, tile_count, rows, x_stride,
    K: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, BIAS: tl.constexpr, BASE: tl.constexpr,
    SPLIT: tl.constexpr, SPLITS: tl.constexpr, SUBS: tl.constexpr, MAX: tl.constexpr, BLOCK_T: tl.constexpr,
    SHRINK_K: tl.constexpr, EXPAND_N: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    shrinking = tile_count * (SPLITS * SUBS)
    BLOCKS: tl.constexpr = (N0 + N1 + N2 + BLOCK_N - 1) // BLOCK_N if BASE else 0
    if pid < shrinking:
        _shrink(
            x, tiles, addresses, ranks, part, done, site, sites, rows, x_stride, pid,
            K, SPLIT, SPLITS, SUBS, MAX, BLOCK_T, SHRINK_K, BLOCK_R,
        )  # fmt: skip
    elif pid < shrinking + BLOCKS:
        _product(
            x, weight, bias, out, rows, x_stride, pid - shrinking,
            K, N0 + N1 + N2, BIAS, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        at = pid - shrinking - BLOCKS
        EXPANDING: tl.constexpr = (
            (N0 + EXPAND_N - 1) // EXPAND_N + (N1 + EXPAND_N - 1) // EXPAND_N + (N2 + EXPAND_N - 1) // EXPAND_N
        )
        _expand(
            tiles, addresses, ranks, scalings, part, done, update, site, sites, rows, at // EXPANDING, at % EXPANDING,
            N0, N1, N2, SPLITS, SUBS, MAX, BLOCK_T, EXPAND_N, BLOCK_R,
        )  # fmt: skip


def project(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    tiles: torch.Tensor,
    done: torch.Tensor,
    addresses: torch.Tensor,
    ranks: torch.Tensor,
    scalings: torch.Tensor,
    *,
    site: int,
    widths: tuple[int, ...],
    tile_rows: int,
    tuning: dict[str, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Neighbouring products of the same input, if `weight` is given, and the updates that the tiles' adapters make to them.

    x [rows, in], at most FEW_ROWS of them with a weight [sum(widths), in]; tiles int32 [n, 3]: first row, last row + 1, slot
    (-1: nothing to do), at most tile_rows rows each; done int32 [n * len(widths)], zeros, counted up; addresses int64
    [slots, 2, sites] of A [r, in] and B, laid out as [r, out]; ranks int32 and scalings float32 [slots, sites]; `site` is the
    first of len(widths) ≤ 3 sites. Returns the products and the updates, both [rows, sum(widths)]; rows in no tile have no
    update: theirs is not written. Without a weight the products are not computed and the first is the second.
    """
    rows, k = x.shape
    subs, total, count = len(widths), sum(widths), tiles.shape[0]
    wide = x.element_size() == 2
    small = tile_rows <= 16
    how = {
        "split": 256 if small and rows <= 16 else 512 if small else k,  # of a shrinking program, at least
        "splits": 16,  # at most
        "shrink_k": (128 if small else 64) if wide else 32,
        "expand_n": 128 if wide else 64,
        "n": 16,
        "k": 256 if wide else 64,
        "warps": 4,
        "stages": 4 if small and wide else 3 if wide else 2,
    } | (tuning or {})
    splits = max(1, min(how["splits"], k // how["split"]))
    split = triton.cdiv(triton.cdiv(k, splits), how["shrink_k"]) * how["shrink_k"]
    splits = triton.cdiv(k, split)
    update = torch.empty(rows, total, dtype=x.dtype, device=x.device)
    out = update if weight is None else torch.empty_like(update)
    part = torch.empty(splits if count else 1, rows, subs, MAX_RANK, dtype=torch.float32, device=x.device)
    n = (*widths, 0, 0)[:3]
    programs = count * splits * subs + count * sum(triton.cdiv(w, how["expand_n"]) for w in widths)
    if weight is not None:
        programs += triton.cdiv(total, how["n"])
    _project[(programs,)](
        x, x if weight is None else weight, x if bias is None else bias, out, tiles, addresses, ranks, scalings, part, done,
        update, site, ranks.shape[1], count, rows, x.stride(0),
        K=k, N0=n[0], N1=n[1], N2=n[2], BIAS=bias is not None, BASE=weight is not None,
        SPLIT=split, SPLITS=splits, SUBS=subs, MAX=MAX_RANK, BLOCK_T=tile_rows,
        SHRINK_K=how["shrink_k"], EXPAND_N=how["expand_n"], BLOCK_R=_RANKS,
        BLOCK_M=FEW_ROWS, BLOCK_N=how["n"], BLOCK_K=how["k"], num_warps=how["warps"], num_stages=how["stages"],
    )  # fmt: skip
    return out, update
