"""Steps in which every request has one token to compute, on a CPU: all layers of a Llama-like decoder in one call of C.

Launched module by module such a step takes longer in Python and torch than in the memory. Embeddings and the head stay
torch modules: there an adapter's own trained rows are chosen (worker/engine/lora.py). Steps with prompts, models that are
built in another way and adapters with trained biases go module by module.
"""

from __future__ import annotations

import ctypes
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from worker.engine.cache import PagedCache
from worker.engine.cpu import library
from worker.engine.cpu.library import Matrix, Pair, Rows
from worker.engine.cpu.linear import CpuLinear, matrix, pair
from worker.engine.llama_like import check, rotary, window_of
from worker.engine.lora import AdapterWeights, LoraBank, segments
from worker.engine.scheduler import Scheduled

_POINTER, _NUMBER, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
# As kernels.c numbers them.
_PROJECTIONS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


class _Layer(ctypes.Structure):
    _fields_ = (
        ("matrices", Matrix * len(_PROJECTIONS)),
        ("input_norm", _POINTER), ("post_norm", _POINTER), ("q_norm", _POINTER), ("k_norm", _POINTER),
        ("keys", _POINTER), ("values", _POINTER), ("window", _NUMBER),
        ("eps", _FLOAT), ("head_eps", _FLOAT), ("scale", _FLOAT),
    )  # fmt: skip


class _Shape(ctypes.Structure):
    _fields_ = (
        ("layers", _NUMBER), ("hidden", _NUMBER), ("heads", _NUMBER), ("kv_heads", _NUMBER), ("width", _NUMBER),
        ("inner", _NUMBER), ("page", _NUMBER), ("norm", _POINTER), ("eps", _FLOAT),
    )  # fmt: skip


class _Step(ctypes.Structure):
    _fields_ = (
        ("rows", _NUMBER), ("blocks", _POINTER), ("lengths", _POINTER), ("most_blocks", _NUMBER),
        ("cosines", _POINTER), ("sines", _POINTER),
    )  # fmt: skip


class CpuDecoder:
    """Runs decode steps of a model. Called from the engine's thread only."""

    def __init__(self, model: Any, bank: LoraBank, cache: PagedCache, max_positions: int) -> None:
        """Raises ValueError, saying why, for a model that is built in another way, and OSError without a compiler."""
        self._layers = library.load().lorry_layers
        self.base = model.get_decoder() if hasattr(model, "get_decoder") else model.model
        self.config = model.config.get_text_config()
        check(self.base, self.config)
        self.bank, self.cache = bank, cache
        self.embed = model.get_input_embeddings()
        prefix = next(n for n, m in model.named_modules() if m is self.base)
        self.sites = [f"{prefix}.layers.{i}.{p}" for i in range(len(self.base.layers)) for p in _PROJECTIONS]
        self.modules: list[nn.Linear] = [model.get_submodule(name) for name in self.sites]
        for name, module in zip(self.sites, self.modules, strict=True):
            if not CpuLinear.takes(module):
                raise ValueError(f"{name} is not a plain linear layer")
        self.cosines, self.sines = rotary(self.base, cache, max_positions)
        _, width, _ = cache.shapes[0]
        inner = self.modules[_PROJECTIONS.index("mlp.gate_proj")].out_features
        if any(n % 8 for n in (self.config.hidden_size, width, inner)):
            raise ValueError("its widths are no multiples of 8")
        self._pairs: WeakKeyDictionary[AdapterWeights, tuple[Any, int]] = WeakKeyDictionary()
        self._described: tuple[_Shape, Any] | None = None

    def release(self) -> None:
        """Forget where weights and cache are; the next step looks again."""
        self._described = None

    def accepts(self, step: list[Scheduled]) -> bool:
        """Whether `run` can take it."""
        return all(
            s.count == 1 and s.start > 0 and (s.request.adapter is None or not s.request.adapter.bias) for s in step
        )

    def run(self, step: list[Scheduled]) -> tuple[torch.Tensor, list[Scheduled]]:
        """As `ModelRunner.forward`."""
        order = sorted(step, key=lambda s: id(s.request.adapter))
        rows, page = len(order), self.cache.block_size
        owners = segments([s.request.adapter for s in order], [1] * rows)
        self.bank.token_segments = self.bank.row_segments = owners
        shape, layers = self._describe()
        positions = torch.tensor([s.start for s in order])
        blocks = [s.request.blocks[: s.start // page + 1] for s in order]
        most = max(len(b) for b in blocks)
        table = torch.tensor([b + [0] * (most - len(b)) for b in blocks])
        lengths = positions + 1
        cosines, sines = self.cosines[positions], self.sines[positions]
        where = _Step(rows, table.data_ptr(), lengths.data_ptr(), most, cosines.data_ptr(), sines.data_ptr())
        pairs = [self._pairs_of(s.adapter) for s in owners]
        runs = (Rows * len(owners))(*(Rows(s.start, s.stop, p) for s, (p, _) in zip(owners, pairs, strict=True)))
        rank = max((rank for _, rank in pairs), default=0)
        ids = torch.tensor([[s.request.tokens(s.start, s.start + 1)[0] for s in order]])
        x = self.embed(ids).float().contiguous()
        heads = shape.heads + shape.kv_heads
        shared = x.new_empty(rows * (2 * shape.hidden + 2 * heads * shape.width + 2 * shape.inner + 3 * rank))
        threads = torch.get_num_threads()
        size = rows * shape.hidden + 2 * shape.width + most * page + 8
        own = x.new_empty(threads * size)
        self._layers(
            ctypes.byref(shape), layers, ctypes.byref(where), runs, len(owners), x.data_ptr(), shared.data_ptr(),
            own.data_ptr(), size, threads,
        )  # fmt: skip
        logits: torch.Tensor = self.bank.head(x)
        return logits[0], order

    def _pairs_of(self, adapter: AdapterWeights) -> tuple[Any, int]:
        """An adapter's updates by site, and its highest rank."""
        found = self._pairs.get(adapter)
        if found is None:
            pairs = (Pair * len(self.sites))(*(pair(adapter.pairs.get(name)) for name in self.sites))
            found = self._pairs[adapter] = (pairs, max((p.rank for p in pairs), default=0))
        return found

    def _describe(self) -> tuple[_Shape, Any]:
        if self._described is None:
            norm = self.base.norm
            kv_heads, width, _ = self.cache.shapes[0]
            count = len(_PROJECTIONS)
            shape = _Shape(
                len(self.base.layers), self.config.hidden_size, self.config.num_attention_heads, kv_heads, width,
                self.modules[4].out_features, self.cache.block_size, norm.weight.data_ptr(), norm.variance_epsilon,
            )  # fmt: skip
            layers = (_Layer * len(self.base.layers))()
            for i, layer in enumerate(self.base.layers):
                attention = layer.self_attn
                keys, values = self.cache.memory(i)
                q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
                layers[i] = _Layer(
                    (Matrix * count)(*(matrix(m) for m in self.modules[i * count : (i + 1) * count])),
                    layer.input_layernorm.weight.data_ptr(), layer.post_attention_layernorm.weight.data_ptr(),
                    None if q_norm is None else q_norm.weight.data_ptr(),
                    None if k_norm is None else k_norm.weight.data_ptr(),
                    keys.data_ptr(), values.data_ptr(), window_of(layer) or 0,
                    layer.input_layernorm.variance_epsilon,
                    0.0 if q_norm is None else q_norm.variance_epsilon, attention.scaling,
                )  # fmt: skip
            self._described = shape, layers
        return self._described
