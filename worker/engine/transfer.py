"""Adapters between the host's memory and a GPU's: laid out there side by side, so that one copy takes a whole one."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from worker.engine.lora import AdapterWeights, LoraPair

# Elements: what is larger (a trained embedding) is a copy of its own, and not moved on the host for it.
_LARGE = 1 << 24
_ALIGNED = 64  # elements, so that the kernels' wide reads find every matrix at a multiple of 16 bytes


def mapped(weights: AdapterWeights, change: Callable[[torch.Tensor], torch.Tensor]) -> AdapterWeights:
    """The same adapter of other tensors."""
    return AdapterWeights(
        {name: LoraPair(change(p.a), change(p.b), p.scaling) for name, p in weights.pairs.items()},
        {name: change(t) for name, t in weights.full.items()},
        {name: change(t) for name, t in weights.bias.items()},
    )


def packed(weights: AdapterWeights) -> AdapterWeights:
    """The same values and strides, in one block of memory for all but the large ones. `weights` are of one type."""
    small = [t for t in weights.tensors if t.numel() <= _LARGE]
    sizes = [-(-t.numel() // _ALIGNED) * _ALIGNED for t in small]
    if not small:
        return weights
    block, at = torch.empty(sum(sizes), dtype=small[0].dtype), 0
    views: dict[int, torch.Tensor] = {}
    for tensor, size in zip(small, sizes, strict=True):
        views[id(tensor)] = view = block.as_strided(tensor.size(), tensor.stride(), at)
        view.copy_(tensor)
        at += size
    return mapped(weights, lambda t: views.get(id(t), t))


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def on_device(weights: AdapterWeights, device: torch.device) -> AdapterWeights:
    """A copy on a GPU, block by block; on a CPU the adapter itself.

    In a stream of its own: in the engine's, every copy would wait for the steps launched before it.
    """
    if device.type != "cuda":
        return weights
    blocks: dict[int, torch.Tensor] = {}

    def copied(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if (block := blocks.get(storage.data_ptr())) is None:
            whole = torch.empty(0, dtype=tensor.dtype).set_(storage)
            block = blocks[storage.data_ptr()] = whole.to(device, non_blocking=True)
        return block.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())

    engine, own = torch.cuda.default_stream(device), _stream(device)
    own.wait_stream(engine)  # once: the base's weights may just have come back
    with torch.cuda.stream(own):
        found = mapped(weights, copied)
    own.synchronize()
    for block in blocks.values():
        block.record_stream(engine)  # its memory is not given to the next adapter while a step still reads it
    return found
