"""Updates of many adapters in two launches a product, after Punica's SGMV (Chen et al. 2023) and S-LoRA (Sheng et al. 2023).

Rows of the same adapter stand together and fall into tiles; a tile's program reads its adapter's matrices through a table of
addresses, so that an adapter's weights lie where they were loaded, in their own rank, and are read once a tile. What came
before a matrix's sum is split into parts that are added in a fixed order: no atomics, the same bits every time.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

MAX_RANK = 256  # an adapter of a higher rank runs through the eager sites
_RANKS = 64  # of a program at a time
_SPLIT = (
    1024  # inputs that a shrinking program sums where rows are few; each further part costs the expanding ones a read
)


@functools.cache
def starts_early(device: torch.device) -> bool:
    """Whether the second launch may begin beside the first and wait within, which takes 1 to 4 % less time for a step.

    That is programmatic dependent launch, which NVIDIA's GPUs have from compute capability 9.0 on.
    """
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return bool(torch.cuda.get_device_capability(device) >= (9, 0))


@triton.jit(do_not_specialize=["site", "sites", "rows"])
def _shrink(
    x, tiles, addresses, ranks, part, site, sites, rows, x_stride,
    K: tl.constexpr, SPLIT: tl.constexpr, SUBS: tl.constexpr, MAX: tl.constexpr, EARLY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
    tile, sub, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot = tl.load(tiles + tile * 3 + 2)
    if slot >= 0:
        rank = tl.load(ranks + slot * sites + site + sub)
        start = tl.load(tiles + tile * 3)
        stop = tl.load(tiles + tile * 3 + 1)
        address = tl.load(addresses + (slot * 2) * sites + site + sub)
        a = tl.multiple_of(address.to(tl.pointer_type(x.dtype.element_ty)), 16)
        m = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
        for first in range(0, rank, BLOCK_R):
            r = first + tl.arange(0, BLOCK_R)
            acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
            for k0 in range(split * SPLIT, min(split * SPLIT + SPLIT, K), BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K)
                xs = tl.load(
                    x + m[:, None] * x_stride + k[None, :], mask=(m < stop)[:, None] & (k < K)[None, :], other=0.0
                )
                w = tl.load(a + r[None, :] * K + k[:, None], mask=(r < rank)[None, :] & (k < K)[:, None], other=0.0)
                acc = tl.dot(xs, w, acc, input_precision="ieee")
            to = part + ((split * rows + m) * SUBS + sub)[:, None] * MAX + r[None, :]
            tl.store(to, acc, mask=(m < stop)[:, None] & (r < rank)[None, :])


@triton.jit(do_not_specialize=["site", "sites", "rows"])
def _expand(
    part, tiles, addresses, ranks, scalings, update, site, sites, rows,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, SPLITS: tl.constexpr, SUBS: tl.constexpr, MAX: tl.constexpr,
    EARLY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    tile, block = tl.program_id(0), tl.program_id(1)
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
        m = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
        n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        r = tl.arange(0, BLOCK_R)
        w = tl.load(b + r[:, None] * width + n[None, :], mask=(r < rank)[:, None] & (n < width)[None, :], other=0.0)
        if EARLY:
            gdc_wait()  # what comes before does not need what _shrink writes
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for first in range(0, rank, BLOCK_R):
            if first > 0:
                r = first + tl.arange(0, BLOCK_R)
                w = tl.load(
                    b + r[:, None] * width + n[None, :], mask=(r < rank)[:, None] & (n < width)[None, :], other=0.0
                )
            mask = (m < stop)[:, None] & (r < rank)[None, :]
            s = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
            for split in tl.static_range(SPLITS):
                at = part + ((split * rows + m) * SUBS + sub)[:, None] * MAX + r[None, :]
                s += tl.load(at, mask=mask, other=0.0)
            acc = tl.dot(s.to(w.dtype), w, acc, input_precision="ieee")
        to = update + m[:, None] * (N0 + N1 + N2) + (column + n)[None, :]
        tl.store(to, (acc * scaling).to(update.dtype.element_ty), mask=(m < stop)[:, None] & (n < width)[None, :])


def lora_update(
    x: torch.Tensor,
    tiles: torch.Tensor,
    addresses: torch.Tensor,
    ranks: torch.Tensor,
    scalings: torch.Tensor,
    *,
    site: int,
    widths: tuple[int, ...],
    tile_rows: int,
) -> torch.Tensor:
    """The updates that the tiles' adapters make to neighbouring products of the same input.

    x [rows, in]; tiles int32 [n, 3]: first row, last row + 1, slot (-1: nothing to do), at most tile_rows rows each;
    addresses int64 [slots, 2, sites] of A [r, in] and B, laid out as [r, out]; ranks int32 and scalings float32 [slots,
    sites]; `site` is the first of len(widths) ≤ 3 sites. Returns [rows, sum(widths)]; rows in no tile are not written.
    """
    rows, k = x.shape
    subs, wide, small = len(widths), x.element_size() == 2, tile_rows <= 16
    split = _SPLIT if small else k
    splits = max(1, min(16, k // split))
    block_k = (128 if small else 64) if wide else 32
    split = triton.cdiv(triton.cdiv(k, splits), block_k) * block_k
    splits = triton.cdiv(k, split)
    part = torch.empty(splits, rows, subs, MAX_RANK, dtype=torch.float32, device=x.device)
    update = torch.empty(rows, sum(widths), dtype=x.dtype, device=x.device)
    n = (*widths, 0, 0)[:3]
    sites = ranks.shape[1]
    early: dict[str, bool] = {"launch_pdl": True} if small and starts_early(x.device) else {}
    _shrink[(tiles.shape[0], subs, splits)](
        x, tiles, addresses, ranks, part, site, sites, rows, x.stride(0),
        K=k, SPLIT=split, SUBS=subs, MAX=MAX_RANK, EARLY=bool(early),
        BLOCK_M=tile_rows, BLOCK_K=block_k, BLOCK_R=_RANKS, num_warps=4, num_stages=3,
    )  # fmt: skip
    block_n = 128 if wide else 64
    _expand[(tiles.shape[0], sum(triton.cdiv(w, block_n) for w in widths))](
        part, tiles, addresses, ranks, scalings, update, site, sites, rows,
        N0=n[0], N1=n[1], N2=n[2], SPLITS=splits, SUBS=subs, MAX=MAX_RANK, EARLY=bool(early),
        BLOCK_M=tile_rows, BLOCK_N=block_n, BLOCK_R=_RANKS, num_warps=4, num_stages=2, **early,
    )  # fmt: skip
    return update
