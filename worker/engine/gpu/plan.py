"""A step's index arrays as one block of int32, so that one copy takes them to the device. No torch, no Triton.

A step that is decodes alone is padded to a bucket, the shape of a captured graph; any other has its own shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from worker.engine.scheduler import Scheduled

DECODE_TILE = 16  # rows of one adapter that a program updates at a time
MIXED_TILE = 64


def buckets(max_batch: int) -> list[int]:
    """Batch sizes that graphs are captured for: 1, 2, 4, then steps that waste at most a third, up to max_batch itself."""
    sizes = [1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256]
    sizes += range(320, max_batch + 1, 64)
    return [*(s for s in sizes if s < max_batch), max_batch]


def chunk_buckets(max_step_tokens: int) -> list[int]:
    """Numbers of tokens that graphs of steps with prompts are captured for. Longer steps run longer than they take to launch."""
    sizes = [64, 128, 256, 512, 1024, 2048]
    return [s for s in sizes if s < max_step_tokens] + [s for s in (max_step_tokens,) if s <= sizes[-1]]


def bucket_of(rows: int, sizes: list[int]) -> int | None:
    """The smallest bucket that holds `rows`; None if none does."""
    return next((s for s in sizes if s >= rows), None)


def tile_limit(rows: int, max_adapters: int) -> int:
    """Tiles that a graph of `rows` has room for: any mix of max_adapters adapters, or a few more."""
    return min(rows, -(-rows // DECODE_TILE) + max_adapters)


def lora_tiles(slots: Sequence[int], counts: Sequence[int], height: int) -> list[tuple[int, ...]]:
    """Cut neighbouring rows of the same slot into tiles (first row, last row + 1, slot); -1, the base, gets none."""
    tiles: list[tuple[int, ...]] = []
    row = begin = 0
    current = -1
    for slot, count in [*zip(slots, counts, strict=True), (-1, 0)]:
        if slot != current:
            if current >= 0:
                tiles += [(at, min(at + height, row), current) for at in range(begin, row, height)]
            begin, current = row, slot
        row += count
    return tiles


def query_tiles(chunks: Sequence[tuple[int, int, int]], height: int) -> list[tuple[int, ...]]:
    """Cut chunks (first row, rows, first position) into tiles (first row, last row + 1, chunk, position of the first)."""
    return [
        (at, min(at + height, first + count), i, position + at - first)
        for i, (first, count, position) in enumerate(chunks)
        for at in range(first, first + count, height)
    ]


# Whose blocks a row of a table holds, and how many: a request's list is its own, and only ever grows.
Written = tuple[list[int], int]
_NO_BLOCKS: list[int] = []


@dataclass(frozen=True)
class Shape:
    """Sizes of a step's arrays."""

    rows: int  # packed tokens; those that decode come first
    decodes: int
    chunks: int
    samples: int
    lora_tiles: int
    query_tiles: int
    width: int  # blocks of the longest sequence

    @cached_property
    def sections(self) -> dict[str, tuple[int, ...]]:
        return {
            "ids": (self.rows,),
            "positions": (self.rows,),
            "slots": (self.rows,),  # cache slots, -1 for padding
            "owners": (self.rows,),  # adapter slots, -1 for the base
            "lengths": (self.decodes,),  # 0 for padding
            # Rows whose next token is wanted. Of decodes it is all; then the rows, in the step before, that they go on from.
            "samples": (self.samples,),
            "lora_tiles": (self.lora_tiles, 3),
            "query_tiles": (self.query_tiles, 4),
            "tables": (self.decodes + self.chunks, self.width),
        }

    @cached_property
    def size(self) -> int:
        return sum(_padded(shape) for shape in self.sections.values())

    def views(self, block: Any) -> Arrays:
        """The arrays within a block of `size` numbers, a NumPy array or a tensor."""
        found, at = {}, 0
        for name, shape in self.sections.items():
            found[name] = block[at : at + math.prod(shape)].reshape(shape)
            at += _padded(shape)
        return Arrays(**found)


def _padded(shape: tuple[int, ...]) -> int:
    """Numbers that a section takes: whole 16 bytes. Triton compiles a kernel anew for pointers that are no multiple of 16."""
    return -(-math.prod(shape) // 4) * 4


@dataclass(slots=True)
class Arrays:
    """The arrays of `Shape.sections`."""

    ids: Any
    positions: Any
    slots: Any
    owners: Any
    lengths: Any
    samples: Any
    lora_tiles: Any
    query_tiles: Any
    tables: Any


def decode_shape(rows: int, max_adapters: int, width: int) -> Shape:
    """Of decodes alone."""
    return Shape(rows, rows, 0, rows, tile_limit(rows, max_adapters), 0, width)


def chunk_shape(rows: int, max_batch: int, max_adapters: int, width: int, height: int) -> Shape:
    """Of `rows` tokens of at most max_batch requests, all taken as chunks, in tiles of `height` queries."""
    requests = min(rows, max_batch)
    # Rows of an adapter come twice, among the decodes and among the prompts.
    tiles = -(-rows // MIXED_TILE) + 2 * max_adapters
    return Shape(rows, 0, requests, requests, tiles, -(-rows // height) + requests, width)


def fill_tiles(array: Any, tiles: list[tuple[int, ...]], nothing: int = -1) -> None:
    """Write tiles; those beyond become `nothing`."""
    if tiles:
        array[: len(tiles)] = tiles
    array[len(tiles) :] = nothing


def is_decode(s: Scheduled) -> bool:
    return s.count == 1 and s.start > 0


def fill_decodes(arrays: Arrays, step: list[Scheduled], owners: list[int], page: int, tables: list[Written]) -> None:
    """Write decodes, row by row, into NumPy arrays of at least as many rows; rows beyond become padding.

    `tables` is what the rows of the block tables hold already: a row that is right is left.
    """
    n, rows = len(step), arrays.ids.shape[0]
    ids, positions, slots = [], [], []
    for row, s in enumerate(step):
        request, at = s.request, s.start
        blocks = request.blocks
        token = request.tokens(at, at + 1)
        ids.append(token[0] if token else 0)  # not known yet: it comes from the device
        positions.append(at)
        slots.append(blocks[at // page] * page + at % page)
        if row >= len(tables):
            tables.append((_NO_BLOCKS, 0))
        if tables[row][0] is not blocks or tables[row][1] != len(blocks):
            arrays.tables[row, : len(blocks)] = blocks
            tables[row] = (blocks, len(blocks))
    arrays.ids[:n], arrays.positions[:n], arrays.slots[:n], arrays.owners[:n] = ids, positions, slots, owners
    arrays.lengths[:n] = arrays.positions[:n]
    arrays.lengths[:n] += 1
    if n < rows:
        arrays.ids[n:], arrays.positions[n:], arrays.slots[n:], arrays.owners[n:] = 0, 0, -1, -1
        arrays.lengths[n:] = 0


def fill_chunks(
    arrays: Arrays, step: list[Scheduled], owners: list[int], page: int, decodes: int
) -> list[tuple[int, int, int]]:
    """Write chunks of prompts behind the first `decodes` rows. Returns (first row, rows, first position) of each."""
    chunks = []
    row = decodes
    for i, s in enumerate(step):
        stop, end = s.start + s.count, row + s.count
        blocks = s.request.blocks
        arrays.ids[row:end] = s.request.tokens(s.start, stop)
        arrays.positions[row:end] = range(s.start, stop)
        arrays.slots[row:end] = [blocks[p // page] * page + p % page for p in range(s.start, stop)]
        arrays.owners[row:end] = owners[i]
        arrays.tables[decodes + i, : len(blocks)] = blocks
        chunks.append((row, s.count, s.start))
        row = end
    return chunks
