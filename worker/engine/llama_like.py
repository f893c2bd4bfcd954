"""Decoders that the engine computes by kernels of its own, on a GPU and on a CPU."""

from __future__ import annotations

from typing import Any

import torch

from worker.engine.cache import PagedCache

# Decoder layers that are RMSNorm, rotary GQA attention, RMSNorm, SwiGLU, and nothing else.
LAYERS = frozenset({"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"})
# Rotary embeddings that depend on the position alone.
_ROTARY = frozenset({"default", "linear", "llama3", "yarn"})


def check(base: Any, config: Any) -> None:
    """Raise ValueError, saying why, for a decoder that is built in another way."""
    kinds = {type(layer).__name__ for layer in base.layers}
    if not kinds <= LAYERS:
        raise ValueError(f"its layers are {', '.join(sorted(kinds))}")
    if config.hidden_act != "silu":
        raise ValueError(f"its activation is {config.hidden_act}")
    if base.rotary_emb.rope_type not in _ROTARY:
        raise ValueError(f"its rotary embedding is of type {base.rotary_emb.rope_type}")


def window_of(layer: Any) -> int | None:
    """How many tokens a layer's attention sees, or None for all."""
    found: int | None = getattr(layer.self_attn, "sliding_window", None)
    if type(layer).__name__ == "MistralDecoderLayer":  # which reads the config's, for all layers
        found = getattr(layer.self_attn.config, "sliding_window", None)
    return found


def rotary(base: Any, cache: PagedCache, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [positions, head width]. Raises ValueError for heads that are rotated in part, or differ in width."""
    weight = base.norm.weight
    at = torch.arange(positions, device=weight.device)[None]
    cos, sin = base.rotary_emb(weight.new_empty(1), position_ids=at)
    width = cache.shapes[0][1]
    if cos.shape[-1] != width or any(s[1:] != (width, width) for s in cache.shapes.values()):
        raise ValueError("its heads are rotated in part, or differ in width")
    return cos[0].contiguous(), sin[0].contiguous()
