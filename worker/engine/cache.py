"""Paged keys and values, and the attention over them.

A step is one row of packed tokens: decoding requests first (one token each), then chunks of prompts. transformers' models
call `PagedCache.attention` through their attention interface, so any model written against it can be served.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from worker.engine.scheduler import Scheduled


@dataclass(slots=True)
class Prefill:
    """A chunk of a prompt: packed tokens start…stop-1, which stand at positions offset… of their sequence."""

    start: int
    stop: int
    offset: int
    slots: torch.Tensor | None  # cache slots of the whole sequence so far, or None for a sequence's first chunk
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def mask(self, window: int | None, device: torch.device) -> torch.Tensor:
        """Boolean [chunk, sequence]: a token sees those before it and itself, at most `window` of them."""
        if window not in self.masks:
            q = torch.arange(self.offset, self.offset + self.stop - self.start, device=device)[:, None]
            k = torch.arange(self.offset + self.stop - self.start, device=device)[None, :]
            mask = k <= q
            self.masks[window] = mask if window is None else mask & (k > q - window)
        return self.masks[window]


@dataclass(slots=True)
class Step:
    """Index tensors of one step, made once and used by every layer."""

    slots: torch.Tensor  # [tokens] where this step's keys and values go
    decodes: int  # the first packed tokens, one a request
    decode_slots: torch.Tensor | None  # [decodes * longest] slots to read, padded with the empty slot
    decode_lengths: torch.Tensor | None  # [decodes]
    prefills: list[Prefill]
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def decode_mask(self, window: int | None) -> torch.Tensor:
        """Boolean [decodes, 1, 1, longest]."""
        if window not in self.masks:
            assert self.decode_slots is not None
            assert self.decode_lengths is not None
            lengths = self.decode_lengths[:, None]
            k = torch.arange(self.decode_slots.numel() // self.decodes, device=lengths.device)[None, :]
            mask = k < lengths
            if window is not None:
                mask &= k >= lengths - window
            self.masks[window] = mask[:, None, None, :]
        return self.masks[window]


class PagedCache:
    """`num_blocks` blocks of `block_size` tokens for every layer. Made before the model has run; `allocate` gives it memory."""

    def __init__(self, block_size: int, device: torch.device) -> None:
        self.block_size = block_size
        self.device = device
        self.shapes: dict[int, tuple[int, int, int]] = {}  # layer → key-value heads, key width, value width
        self.step: Step | None = None
        self._empty = 0
        self._keys: dict[int, torch.Tensor] = {}
        self._values: dict[int, torch.Tensor] = {}

    def bytes_per_block(self, dtype: torch.dtype) -> int:
        per_token = sum(heads * (dk + dv) for heads, dk, dv in self.shapes.values())
        return per_token * self.block_size * int(dtype.itemsize)

    def allocate(self, num_blocks: int, dtype: torch.dtype) -> None:
        """Take the memory. `shapes` has been filled by a probing forward pass (a step of None)."""
        slots = num_blocks * self.block_size + 1
        # Padding reads a slot nobody writes: masked out or not, a NaN of one request would reach the others through it.
        self._empty = slots - 1
        for layer, (heads, dk, dv) in self.shapes.items():
            self._keys[layer] = torch.zeros(slots, heads, dk, dtype=dtype, device=self.device)
            self._values[layer] = torch.zeros(slots, heads, dv, dtype=dtype, device=self.device)

    def memory(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's keys [slots, heads, key width] and values [slots, heads, value width]."""
        return self._keys[layer], self._values[layer]

    def release(self) -> None:
        """Give the memory back; `allocate` takes it again, without what was in it."""
        self.step = None
        self._keys.clear()
        self._values.clear()

    def slots_of(self, blocks: list[int], start: int, stop: int) -> list[int]:
        """Slots of a sequence's tokens start…stop-1."""
        size = self.block_size
        return [blocks[i // size] * size + i % size for i in range(start, stop)]

    def plan(self, scheduled: list[Scheduled]) -> Step:
        """Index tensors for requests in packed order: every decode before every prefill."""
        slots: list[int] = []
        histories: list[list[int]] = []
        prefills: list[Prefill] = []
        for s in scheduled:
            stop = s.start + s.count
            if s.count == 1 and s.start > 0:
                histories.append(self.slots_of(s.request.blocks, 0, stop))
                slots.append(histories[-1][-1])
            else:
                whole = self.slots_of(s.request.blocks, 0, stop)
                first = s.start == 0
                begin = len(slots)
                slots += whole[s.start :]
                prefills.append(Prefill(begin, len(slots), s.start, None if first else self._tensor(whole)))
        lengths = [len(h) for h in histories]
        longest = max(lengths, default=0)
        padded = [slot for h in histories for slot in (*h, *([self._empty] * (longest - len(h))))]
        return Step(
            slots=self._tensor(slots),
            decodes=len(histories),
            decode_slots=self._tensor(padded) if histories else None,
            decode_lengths=self._tensor(lengths) if histories else None,
            prefills=prefills,
        )

    def _tensor(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def attention(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """transformers' attention interface: query [1, heads, tokens, width], key and value [1, kv heads, tokens, width].

        Returns [1, tokens, heads, width]. Raises NotImplementedError for logit soft-capping and attention sinks.
        """
        if softcap is not None or s_aux is not None:
            raise NotImplementedError("models with capped attention logits or attention sinks cannot be served yet")
        layer = module.layer_idx
        step = self.step
        if step is None:
            self.shapes[layer] = (key.shape[1], key.shape[3], value.shape[3])
            out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
            return out.transpose(1, 2), None
        keys, values = self._keys[layer], self._values[layer]
        keys.index_copy_(0, step.slots, key[0].transpose(0, 1))
        values.index_copy_(0, step.slots, value[0].transpose(0, 1))
        tokens, heads, kv_heads = query.shape[2], query.shape[1], key.shape[1]
        out = query.new_empty(tokens, heads, value.shape[3])
        if step.decodes:
            n = step.decodes
            assert step.decode_slots is not None
            k = keys.index_select(0, step.decode_slots).view(n, -1, kv_heads, key.shape[3]).transpose(1, 2)
            v = values.index_select(0, step.decode_slots).view(n, -1, kv_heads, value.shape[3]).transpose(1, 2)
            # The query heads of a group share their keys: as "positions" of one key-value head they need no copies of it.
            q = query[0, :, :n].transpose(0, 1).reshape(n, kv_heads, heads // kv_heads, -1)
            o = scaled_dot_product_attention(q, k, v, attn_mask=step.decode_mask(sliding_window), scale=scaling)
            out[:n] = o.reshape(n, heads, -1)
        for p in step.prefills:
            q = query[:, :, p.start : p.stop]
            if p.slots is None:
                k, v = key[:, :, p.start : p.stop], value[:, :, p.start : p.stop]
            else:
                k = keys.index_select(0, p.slots).transpose(0, 1)[None]
                v = values.index_select(0, p.slots).transpose(0, 1)[None]
            if p.slots is None and (sliding_window is None or p.stop - p.start <= sliding_window):
                o = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
            else:
                mask = p.mask(sliding_window, self.device)
                o = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, enable_gqa=True)
            out[p.start : p.stop] = o[0].transpose(0, 1)
        return out[None], None
