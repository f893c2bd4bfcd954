"""A Llama-like decoder's layers in few launches, over packed rows and paged memory.

Products stay cuBLAS's (or bitsandbytes'), with q/k/v and gate/up of one input joined; what stands between them is one kernel
each. The weights are the model's own: joined ones are laid side by side and the modules keep views of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from worker.engine.cache import PagedCache
from worker.engine.gpu.attention import chunk_attention, decode_attention
from worker.engine.gpu.elementwise import add_norm, rotate_and_store, swiglu
from worker.engine.gpu.lora import lora_update
from worker.engine.gpu.plan import Arrays
from worker.engine.gpu.slots import AdapterSlots
from worker.engine.llama_like import check, rotary, window_of


class Projection:
    """Products of one input, side by side in one output."""

    def __init__(self, names: list[str], modules: list[nn.Module], first_site: int) -> None:
        self.names = names
        self.modules = modules
        self.site = first_site
        self.widths = tuple(int(m.out_features) for m in modules)
        self.weight: torch.Tensor | None = None
        self.bias: torch.Tensor | None = None
        self._joined = False
        if all(type(m) is nn.Linear for m in modules) and len({m.bias is None for m in modules}) == 1:
            self._join()

    def _join(self) -> None:
        if len(self.modules) > 1:
            weight = torch.cat([m.weight.detach() for m in self.modules])
            for module, rows in zip(self.modules, weight.split(self.widths), strict=True):
                module.weight = nn.Parameter(rows, requires_grad=False)
        self._joined = True
        self.bind()

    def bind(self) -> None:
        """Find the weights again after they have been moved; the modules' own are what was moved."""
        if not self._joined:
            return
        first = self.modules[0].weight.detach()
        whole = torch.empty(0, dtype=first.dtype, device=first.device)
        self.weight = whole.set_(
            first.untyped_storage(), first.storage_offset(), (sum(self.widths), first.shape[1]), (first.shape[1], 1)
        )
        if self.modules[0].bias is not None:
            self.bias = torch.cat([m.bias.detach() for m in self.modules])

    def unbind(self) -> None:
        """Hold no memory but the modules'."""
        self.weight = self.bias = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, in] → [rows, sum of widths]."""
        if self.weight is not None:
            return linear(x, self.weight, self.bias)
        if len(self.modules) == 1:
            out: torch.Tensor = self.modules[0](x)
            return out
        return torch.cat([m(x) for m in self.modules], dim=-1)


@dataclass(slots=True)
class _Layer:
    index: int
    input_norm: nn.Module
    qkv: Projection
    head_norms: tuple[torch.Tensor, torch.Tensor, float] | None
    o: Projection
    window: int | None
    scale: float
    post_norm: nn.Module
    gate_up: Projection
    down: Projection


@dataclass(slots=True)
class Lora:
    """Whose updates a step adds."""

    slots: AdapterSlots
    tile_rows: int
    beside: torch.cuda.Stream | None = None  # where updates run beside the products they add to, in a captured graph


class Decoder:
    """The layers and the final norm of a causal language model of a kind that worker/engine/llama_like.py knows."""

    def __init__(self, model: Any, cache: PagedCache, max_positions: int) -> None:
        """Raises ValueError, saying why, for a model that is built in another way."""
        self.base = model.get_decoder() if hasattr(model, "get_decoder") else model.model
        config = model.config.get_text_config()
        check(self.base, config)
        self.cache = cache
        self.heads = int(config.num_attention_heads)
        prefix = next(n for n, m in model.named_modules() if m is self.base)
        self.sites: list[str] = []
        self.layers = [self._layer(f"{prefix}.layers.{i}", i, layer) for i, layer in enumerate(self.base.layers)]
        self.rotary = rotary(self.base, cache, max_positions)

    def _layer(self, name: str, index: int, layer: Any) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        norms = None
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm, attention.k_norm
            norms = (q.weight.detach(), k.weight.detach(), float(q.variance_epsilon))
        return _Layer(
            index=index,
            input_norm=layer.input_layernorm,
            qkv=self._projection(f"{name}.self_attn", attention, "q_proj", "k_proj", "v_proj"),
            head_norms=norms,
            o=self._projection(f"{name}.self_attn", attention, "o_proj"),
            window=window_of(layer),
            scale=float(attention.scaling),
            post_norm=layer.post_attention_layernorm,
            gate_up=self._projection(f"{name}.mlp", mlp, "gate_proj", "up_proj"),
            down=self._projection(f"{name}.mlp", mlp, "down_proj"),
        )

    @property
    def projections(self) -> list[Projection]:
        return [p for layer in self.layers for p in (layer.qkv, layer.o, layer.gate_up, layer.down)]

    def _projection(self, parent: str, module: Any, *names: str) -> Projection:
        made = Projection([f"{parent}.{n}" for n in names], [getattr(module, n) for n in names], len(self.sites))
        if any(w % 16 for w in made.widths):
            raise ValueError(f"{parent} has products whose width is no multiple of 16")
        self.sites += made.names
        return made

    def forward(self, hidden: torch.Tensor, step: Arrays, lora: Lora | None, splits: int | None = None) -> torch.Tensor:
        """Run all layers. hidden [rows, hidden], overwritten; `step` holds device tensors. Returns normed [rows, hidden]."""
        out = update = None
        decodes, chunks = step.lengths.shape[0], step.query_tiles.shape[0]
        for layer in self.layers:
            keys, values = self.cache.memory(layer.index)
            x = add_norm(hidden, out, update, step.owners, *_norm(layer.input_norm))
            qkv, update = self._project(layer.qkv, x, step, lora)
            rotate_and_store(
                qkv, update, step.owners, step.positions, step.slots, self.rotary, keys, values, layer.head_norms,
                self.heads,
            )  # fmt: skip
            attended = qkv.new_empty(qkv.shape[0], self.heads * values.shape[2])
            how: dict[str, Any] = {"heads": self.heads, "scale": layer.scale, "window": layer.window}
            how["page"] = self.cache.block_size
            if decodes:
                decode_attention(qkv, keys, values, attended, step.tables, step.lengths, splits=splits, **how)
            if chunks:
                chunk_attention(qkv, keys, values, attended, step.tables[decodes:], step.query_tiles, **how)
            out, update = self._project(layer.o, attended, step, lora)
            x = add_norm(hidden, out, update, step.owners, *_norm(layer.post_norm))
            gate_up, update = self._project(layer.gate_up, x, step, lora)
            out, update = self._project(layer.down, swiglu(gate_up, update, step.owners), step, lora)
        return add_norm(hidden, out, update, step.owners, *_norm(self.base.norm))

    def _project(
        self, projection: Projection, x: torch.Tensor, step: Arrays, lora: Lora | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A product, and the adapters' update of it."""
        if lora is None:
            return projection(x), None
        if lora.beside is None:
            return projection(x), self._update(projection, x, step, lora)
        main = torch.cuda.current_stream()
        lora.beside.wait_stream(main)
        with torch.cuda.stream(lora.beside):
            update = self._update(projection, x, step, lora)
        out = projection(x)
        main.wait_stream(lora.beside)
        return out, update

    def _update(self, projection: Projection, x: torch.Tensor, step: Arrays, lora: Lora) -> torch.Tensor:
        s = lora.slots
        return lora_update(
            x, step.lora_tiles, s.addresses, s.ranks, s.scalings,
            site=projection.site, widths=projection.widths, tile_rows=lora.tile_rows,
        )  # fmt: skip


def _norm(module: Any) -> tuple[torch.Tensor, float]:
    return module.weight, module.variance_epsilon
