"""Steps on a GPU: as captured graphs but for large ones, which run launch by launch; neither with a wait for the device.

Embeddings and the head stay outside the graphs: there an adapter's own trained rows are chosen as they are without a GPU
(worker/engine/lora.py), so they are exact in any mixed batch, and cost three launches a step.
"""

from __future__ import annotations

import itertools
import logging
from typing import Any

import torch

from worker.engine.cache import PagedCache
from worker.engine.gpu import plan
from worker.engine.gpu.attention import QUERY_TILE
from worker.engine.gpu.decoder import Decoder, Lora
from worker.engine.gpu.slots import AdapterSlots
from worker.engine.lora import LoraBank, segments
from worker.engine.sampling import Chosen
from worker.engine.scheduler import Scheduled

log = logging.getLogger("lorry.engine")


class _Bucket:
    """Buffers at fixed addresses for steps of up to `shape`, and the graphs that read them."""

    def __init__(self, shape: plan.Shape, tile_rows: int, device: torch.device) -> None:
        self.shape = shape
        self.tile_rows = tile_rows  # of an adapter
        self.block = torch.zeros(shape.size, dtype=torch.int32, device=device)
        self.arrays = shape.views(self.block)
        self.arrays.slots.fill_(-1)
        self.arrays.lora_tiles.fill_(-1)
        pin = device.type == "cuda"
        # Two: the next step is written while the copy of the one before may still wait in the stream.
        self._host = [torch.zeros(shape.size, dtype=torch.int32, pin_memory=pin) for _ in range(2)]
        self._views = [shape.views(host.numpy()) for host in self._host]
        self._copied = [torch.cuda.Event() if pin else None for _ in range(2)]
        self._written: list[list[plan.Written]] = [[], []]  # what the rows of their block tables hold
        self._turn = 0
        self.graphs: dict[bool, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}

    def host(self) -> tuple[plan.Arrays, list[plan.Written]]:
        """NumPy arrays to write the next step into, as they were two steps ago."""
        self._turn = 1 - self._turn
        if (copied := self._copied[self._turn]) is not None:
            copied.synchronize()
        return self._views[self._turn], self._written[self._turn]

    def send(self) -> None:
        """Copy what was written to the device."""
        self.block.copy_(self._host[self._turn], non_blocking=True)
        if (copied := self._copied[self._turn]) is not None:
            copied.record()


class GpuSteps:
    """Runs steps of a model that `Decoder` knows. Called from the engine's thread only."""

    def __init__(
        self,
        model: Any,
        bank: LoraBank,
        cache: PagedCache,
        *,
        max_batch: int,
        max_adapters: int,
        max_positions: int,
        max_step_tokens: int,
    ) -> None:
        """Raises ValueError for a model it does not know, or whose outputs it does not reproduce."""
        self.bank = bank
        self.cache = cache
        self.decoder = Decoder(model, cache, max_positions)
        self.embed = model.get_input_embeddings()
        weight = self.decoder.base.norm.weight
        self.device = weight.device
        outside = {n for n, m in model.named_modules() if m is self.embed or m is bank.head}
        self.slots = AdapterSlots(self.decoder.sites, outside, max_adapters + max_batch, weight.dtype, self.device)
        self._check()
        self.sizes, self.chunk_sizes = plan.buckets(max_batch), plan.chunk_buckets(max_step_tokens)
        # Adapters that a step may mix: those kept, and as many that have left while requests of theirs still run.
        self._max_adapters, self._width = 2 * max_adapters, -(-max_positions // cache.block_size)
        self._beside = torch.cuda.Stream() if self.device.type == "cuda" else None
        self.captured = False
        self._allocate()

    def _allocate(self) -> None:
        weight = self.decoder.base.norm.weight
        most = max(self.sizes[-1], *self.chunk_sizes)
        self.hidden = torch.zeros(most, weight.shape[0], dtype=weight.dtype, device=self.device)
        self.buckets = {
            n: _Bucket(plan.decode_shape(n, self._max_adapters, self._width), plan.DECODE_TILE, self.device)
            for n in self.sizes
        }
        self.chunk_buckets = {
            n: _Bucket(
                plan.chunk_shape(n, self.sizes[-1], self._max_adapters, self._width, QUERY_TILE),
                plan.MIXED_TILE,
                self.device,
            )
            for n in self.chunk_sizes
        }

    def release(self) -> None:
        """Give up what is tied to addresses of weights, adapters and cache, which may then move. `prepare` takes it again."""
        self.captured = False
        self.buckets, self.chunk_buckets = {}, {}
        self.hidden = torch.empty(0)
        self.slots.forget()
        for projection in self.decoder.projections:
            projection.unbind()

    def prepare(self) -> None:
        """Undo `release`, but for the graphs."""
        for projection in self.decoder.projections:
            projection.bind()
        self._allocate()

    def accepts(self, step: list[Scheduled]) -> bool:
        """Whether the kernels can serve every adapter of the step."""
        return all(self.slots.fits(s.request.adapter) for s in step)

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def capture(self) -> None:
        """Capture the graphs, with and without adapters, largest first: they share one pool of memory."""
        pool = torch.cuda.graph_pool_handle()
        buckets = [*reversed(self.chunk_buckets.values()), *reversed(self.buckets.values())]
        for bucket in buckets:
            for with_lora in (True, False):
                for _ in range(2):  # compiles and warms what must not happen while capturing
                    self._layers(bucket, with_lora)
                graph = torch.cuda.CUDAGraph()
                # Thread-local: an adapter may be loading in another thread.
                with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                    out = self._layers(bucket, with_lora)
                bucket.graphs[with_lora] = (graph, out)
        torch.cuda.synchronize()
        self.captured = True
        log.info("captured %d CUDA graphs for batches of up to %d", 2 * len(buckets), self.sizes[-1])

    def run(self, step: list[Scheduled], previous: Chosen | None = None) -> tuple[torch.Tensor, list[Scheduled]]:
        """Launch a step. Returns logits [rows, vocabulary] and the scheduled requests they belong to, row by row.

        With `previous`, the step's tokens are those that it chose, and are not known here yet.
        """
        slots = self.slots.assign([s.request.adapter for s in step])
        slot_of = {id(s): slots[s.request.adapter] if s.request.adapter is not None else -1 for s in step}
        order = sorted(step, key=lambda s: (not plan.is_decode(s), slot_of[id(s)]))
        owners = [slot_of[id(s)] for s in order]
        if plan.is_decode(order[-1]):
            return self._decode(order, owners, previous), order
        return self._mixed(order, owners)

    def _decode(self, step: list[Scheduled], owners: list[int], previous: Chosen | None) -> torch.Tensor:
        n = len(step)
        tiles = plan.lora_tiles(owners, [1] * n, plan.DECODE_TILE)
        rows = plan.bucket_of(n, self.sizes)
        if rows is not None and len(tiles) <= self.buckets[rows].shape.lora_tiles:
            bucket = self.buckets[rows]
        else:  # more adapters than are kept loaded: some have left and have requests still
            width = max(len(s.request.blocks) for s in step)
            bucket = _Bucket(plan.decode_shape(n, n, width), plan.DECODE_TILE, self.device)
        host, written = bucket.host()
        if previous is not None:
            host.samples[:n] = [previous.rows[id(s.request)] for s in step]
        plan.fill_decodes(host, step, owners, self.cache.block_size, written)
        plan.fill_tiles(host.lora_tiles, tiles)
        bucket.send()
        a = bucket.arrays
        ids = a.ids[:n] if previous is None else previous.tokens.index_select(0, a.samples[:n])
        return self._head(self._replay(bucket, ids, step, bool(tiles)), step)

    def _replay(self, bucket: _Bucket, ids: torch.Tensor, step: list[Scheduled], with_lora: bool) -> torch.Tensor:
        """Normed hidden states of the bucket's step [tokens, hidden], until the next replay."""
        n = ids.shape[0]
        self.hidden[:n] = self._embed(ids, step)
        if (found := bucket.graphs.get(with_lora)) is None:
            return self._layers(bucket, with_lora)[:n]
        graph, out = found
        graph.replay()
        return out[:n]

    def _layers(self, bucket: _Bucket, with_lora: bool) -> torch.Tensor:
        beside = self._beside if bucket.tile_rows == plan.DECODE_TILE else None
        lora = Lora(self.slots, bucket.tile_rows, beside) if with_lora else None
        return self.decoder.forward(self.hidden[: bucket.shape.rows], bucket.arrays, lora)

    def _mixed(self, step: list[Scheduled], owners: list[int]) -> tuple[torch.Tensor, list[Scheduled]]:
        counts = [s.count for s in step]
        rows, page = sum(counts), self.cache.block_size
        sampling = [s for s in step if s.samples]
        ends = itertools.accumulate(counts)
        samples = [end - 1 for s, end in zip(step, ends, strict=True) if s.samples]
        tiles = plan.lora_tiles(owners, counts, plan.MIXED_TILE)
        size = plan.bucket_of(rows, self.chunk_sizes)
        if self.captured and size is not None and len(tiles) <= self.chunk_buckets[size].shape.lora_tiles:
            # Small steps are all launches. Decodes run as chunks of one token: one kind of attention less to bring in shape.
            bucket = self.chunk_buckets[size]
            host, _ = bucket.host()
            found = plan.fill_chunks(host, step, owners, page, 0)
            host.slots[rows:], host.owners[rows:] = -1, -1
            plan.fill_tiles(host.query_tiles, plan.query_tiles(found, QUERY_TILE), 0)
            plan.fill_tiles(host.lora_tiles, tiles)
            host.samples[: len(samples)] = samples
            bucket.send()
            out = self._replay(bucket, bucket.arrays.ids[:rows], step, bool(tiles))
            return self._head(out.index_select(0, bucket.arrays.samples[: len(samples)]), sampling), sampling
        decodes = sum(map(plan.is_decode, step))
        chunks = sum(-(-c // QUERY_TILE) for c in counts[decodes:])
        # Of four: the chunks' tables, behind those of the decodes, begin at a multiple of 16 bytes too.
        width = -(-max(len(s.request.blocks) for s in step) // 4) * 4
        shape = plan.Shape(rows, decodes, len(step) - decodes, len(sampling), len(tiles), chunks, width)
        block = torch.empty(shape.size, dtype=torch.int32, pin_memory=self.device.type == "cuda")
        host = shape.views(block.numpy())
        plan.fill_decodes(host, step[:decodes], owners[:decodes], page, [])
        found = plan.fill_chunks(host, step[decodes:], owners[decodes:], page, decodes)
        plan.fill_tiles(host.query_tiles, plan.query_tiles(found, QUERY_TILE))
        plan.fill_tiles(host.lora_tiles, tiles)
        host.samples[:] = samples
        device = shape.views(block.to(self.device, non_blocking=True))
        lora = Lora(self.slots, plan.MIXED_TILE) if tiles else None
        out = self.decoder.forward(self._embed(device.ids, step), device, lora)
        return self._head(out.index_select(0, device.samples), sampling), sampling

    def _embed(self, ids: torch.Tensor, step: list[Scheduled]) -> torch.Tensor:
        self.bank.token_segments = segments([s.request.adapter for s in step], [s.count for s in step])
        hidden: torch.Tensor = self.embed(ids[None])[0]
        self.bank.token_segments = []  # the layers' products are updated by the kernels
        return hidden

    def _head(self, hidden: torch.Tensor, sampling: list[Scheduled]) -> torch.Tensor:
        self.bank.row_segments = segments([s.request.adapter for s in sampling], [1] * len(sampling))
        logits: torch.Tensor = self.bank.head(hidden[None])[0]
        return logits

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def _check(self) -> None:
        """The kernels' output for a few tokens against the model's own. Raises ValueError if they differ."""
        page, n = self.cache.block_size, 20
        ids = torch.arange(n, device=self.device) * 7 % self.embed.num_embeddings
        self.cache.step = None
        self.bank.token_segments, self.bank.row_segments = [], []
        own = self.decoder.base(
            input_ids=ids[None], position_ids=torch.arange(n, device=self.device)[None], use_cache=False
        )
        blocks = -(-n // page)
        if self.cache.memory(0)[0].shape[0] < blocks * page:
            raise ValueError(f"its cache holds fewer than {n} tokens")
        rows = []
        for first, count in ((0, n - 1), (n - 1, 1)):  # a chunk, then a decode
            shape = plan.Shape(
                count, 0 if first == 0 else 1, 1 if first == 0 else 0, 0, 0, 1 if first == 0 else 0, blocks
            )
            host = torch.zeros(shape.size, dtype=torch.int32)
            a = shape.views(host)
            a.positions[:] = torch.arange(first, first + count)
            a.slots[:] = a.positions
            a.owners[:] = -1
            a.lengths[:] = n
            a.query_tiles[:] = torch.tensor([[0, count, 0, 0]])
            a.tables[:] = torch.arange(blocks)
            hidden = self.embed(ids[None, first : first + count])[0].clone()
            rows.append(self.decoder.forward(hidden, shape.views(host.to(self.device)), None))
        wanted, got = own.last_hidden_state[0].float(), torch.cat(rows).float()
        error = float((got - wanted).norm() / wanted.norm())
        exact = self.decoder.base.norm.weight.dtype == torch.float32
        if not error < (1e-3 if exact else 5e-2):
            raise ValueError(f"the kernels' output differs from its own by {error:.2g}")
