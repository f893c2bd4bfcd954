"""LoRA on a running base model: every site adds the update of whatever adapter its tokens belong to.

The packed tokens of a step fall into segments, one a run of tokens of the same adapter. A site is one Linear or Embedding
of the base; its forward computes the base's output for all tokens at once, then each segment's update in the adapter's own
rank: nothing is padded, and adapters of any rank, scaling and set of target modules share a step. The base's weights are
never changed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import embedding, linear

if TYPE_CHECKING:
    from worker.engine.cpu.linear import CpuLinear


@dataclass(frozen=True, slots=True)
class LoraPair:
    """One site's update: x @ a.T @ b.T * scaling (+ bias). For an Embedding a is [vocabulary, r], looked up by token."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float


@dataclass(slots=True, eq=False, weakref_slot=True)
class AdapterWeights:
    """An adapter's tensors on the engine's device, by the name of the base's module."""

    pairs: dict[str, LoraPair] = field(default_factory=dict)
    full: dict[str, torch.Tensor] = field(
        default_factory=dict
    )  # trained embed_tokens and lm_head, in place of the base's
    bias: dict[str, torch.Tensor] = field(default_factory=dict)  # trained bias less the base's

    @property
    def sites(self) -> set[str]:
        return {*self.pairs, *self.full, *self.bias}

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [t for p in self.pairs.values() for t in (p.a, p.b)] + [*self.full.values(), *self.bias.values()]

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors)


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows start…stop-1 belong to one adapter. Rows of the base alone are in no segment."""

    start: int
    stop: int
    adapter: AdapterWeights


def segments(owners: list[AdapterWeights | None], counts: list[int]) -> list[Segment]:
    """Join neighbours: `owners[i]` owns the next `counts[i]` rows."""
    found: list[Segment] = []
    row = 0
    for owner, count in zip(owners, counts, strict=True):
        if owner is not None:
            if found and found[-1].adapter is owner and found[-1].stop == row:
                found[-1] = Segment(found[-1].start, row + count, owner)
            else:
                found.append(Segment(row, row + count, owner))
        row += count
    return found


class LoraBank:
    """Installs sites on a model and tells them each step's segments."""

    def __init__(self, model: nn.Module, head: nn.Module, kernel: CpuLinear | None = None) -> None:
        """`kernel` computes the plain linear layers, adapters' updates included."""
        self.model = model
        self.head = head
        self.kernel = kernel
        self.token_segments: list[Segment] = []
        self.row_segments: list[Segment] = []  # rows whose logits are wanted: what lm_head sees
        self._installed: set[str] = set()
        if kernel is not None:
            for module in model.modules():
                if kernel.takes(module):
                    module.forward = partial(kernel, module)

    def install(self, names: set[str]) -> None:
        """Give the named modules a forward that knows adapters. Safe while the model runs: a forward is one attribute."""
        for name in names - self._installed:
            module = self.model.get_submodule(name)
            if module is self.head:
                module.forward = self._head_site(name, module, module.forward)
            elif isinstance(module, nn.Embedding):
                module.forward = self._embedding_site(name, module, module.forward)
            elif self.kernel is not None and self.kernel.takes(module):
                module.forward = self._fused_site(name, module, self.kernel)
            else:
                module.forward = self._linear_site(name, module.forward)
            self._installed.add(name)

    def _fused_site(self, name: str, module: nn.Linear, kernel: CpuLinear) -> Callable[[torch.Tensor], torch.Tensor]:
        def forward(x: torch.Tensor) -> torch.Tensor:
            if not self.token_segments:
                return kernel(module, x)
            return kernel.updated(module, x, name, self.token_segments)

        return forward

    def _linear_site(
        self, name: str, base: Callable[[torch.Tensor], torch.Tensor]
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        def forward(x: torch.Tensor) -> torch.Tensor:
            out = base(x)
            if self.token_segments:
                _add_updates(name, self.token_segments, x, out)
            return out

        return forward

    def _head_site(
        self, name: str, module: nn.Module, base: Callable[[torch.Tensor], torch.Tensor]
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        def forward(x: torch.Tensor) -> torch.Tensor:
            own = [s for s in self.row_segments if name in s.adapter.full]
            if not own:
                out = base(x)
            else:
                # The head is a good part of a small model: the base's runs only on the rows that want it.
                taken = {row for s in own for row in range(s.start, s.stop)}
                rest = [row for row in range(x.shape[1]) if row not in taken]
                width = own[0].adapter.full[name].shape[0]
                out = x.new_empty(1, x.shape[1], width)
                if rest:
                    index = torch.tensor(rest, device=x.device)
                    out[:, index] = base(x[:, index])
                for s in own:
                    out[:, s.start : s.stop] = linear(x[:, s.start : s.stop], s.adapter.full[name])
            if self.row_segments:
                _add_updates(name, self.row_segments, x, out)
            return out

        return forward

    def _embedding_site(
        self, name: str, module: nn.Embedding, base: Callable[[torch.Tensor], torch.Tensor]
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        # Gemma's embeddings are scaled inside the module.
        scale = getattr(module, "embed_scale", None)

        def forward(ids: torch.Tensor) -> torch.Tensor:
            out = base(ids)
            for s in self.token_segments:
                rows = ids[:, s.start : s.stop]
                if (full := s.adapter.full.get(name)) is not None:
                    found = embedding(rows, full)
                    out[:, s.start : s.stop] = found if scale is None else found * scale.to(found.dtype)
                if (pair := s.adapter.pairs.get(name)) is not None:
                    update = linear(embedding(rows, pair.a), pair.b) * pair.scaling
                    out[:, s.start : s.stop] += update if scale is None else update * scale.to(update.dtype)
            return out

        return forward


def _add_updates(name: str, found: list[Segment], x: torch.Tensor, out: torch.Tensor) -> None:
    """Add each segment's update in place. x [1, rows, in], out [1, rows, out]."""
    for s in found:
        if (pair := s.adapter.pairs.get(name)) is not None:
            rows = x[0, s.start : s.stop].to(pair.a.dtype)
            out[0, s.start : s.stop].addmm_(rows @ pair.a.t(), pair.b.t(), alpha=pair.scaling)
        if (bias := s.adapter.bias.get(name)) is not None:
            out[0, s.start : s.stop] += bias
