"""Linear layers on a CPU by kernels.c.

torch computes a few rows with kernels made for many (in float32 two rows take twice as long as one) or, in 16 bits without
hardware for them, row by row. Here every weight is read once, in the type it is held in: weights of 16 bits take half the
time of float32's, and nothing is lost, since they are exact in the float32 in which all is computed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import linear

from worker.engine.cpu import library
from worker.engine.cpu.library import Matrix, Pair, Rows

if TYPE_CHECKING:
    from worker.engine.lora import LoraPair, Segment


@dataclass(frozen=True, slots=True)
class _Updates:
    """A site's updates as the kernel takes them: C arrays, and room for what they compute on the way."""

    rows: Any
    count: int
    pairs: Any  # what `rows` points into
    room: torch.Tensor
    biased: list[tuple[Segment, torch.Tensor]]


class CpuLinear:
    """The kernel of one matrix. Raises OSError where it cannot be compiled or loaded, or does not compute what torch does."""

    def __init__(self) -> None:
        self._linear = library.load().lorry_linear
        self._found: list[Segment] = []
        self._updates: dict[str, _Updates] = {}  # for the segments in _found, by site
        self._check()

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def _check(self) -> None:
        for dtype in library.TYPES:
            module = nn.Linear(67, 37)
            module.weight.data = module.weight.data.to(dtype)
            for rows in (1, 2, 11):
                x = torch.arange(rows * 67).view(1, rows, 67) % 13 / 13
                expected = linear(x, module.weight.float(), module.bias)
                if not torch.allclose(self(module, x), expected, atol=1e-4):
                    raise OSError(f"the compiled kernel computes something else in {dtype}")

    @staticmethod
    def takes(module: nn.Module) -> bool:
        """Whether it computes this module: a plain linear layer."""
        return type(module) is nn.Linear and module.weight.dtype in library.TYPES and module.weight.is_contiguous()

    @staticmethod
    def widen(model: nn.Module) -> None:
        """Make everything float32 but the matrices of plain linear layers and embeddings, which keep the type they came in."""
        plain = (nn.Linear, nn.Embedding)
        keep = {id(m.weight) for m in model.modules() if type(m) in plain}
        # Scaled embeddings (Gemma's) round by their own type.
        keep -= {id(p) for m in model.modules() if type(m) not in plain for p in m.parameters(recurse=False)}
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point() and (id(tensor) not in keep or tensor.dtype not in library.TYPES):
                tensor.data = tensor.data.float()
        for module in model.modules():
            if type(module) is nn.Embedding and module.weight.dtype != torch.float32:
                module.forward = partial(_looked_up, module.forward)

    def __call__(self, module: nn.Linear, x: torch.Tensor, updates: _Updates | None = None) -> torch.Tensor:
        """`module`'s output. x [1, rows, in], float32."""
        x = x.contiguous()
        rows, m = x.shape[1], matrix(module)
        out = x.new_empty(1, rows, m.out)
        self._linear(
            ctypes.byref(m),
            x.data_ptr(),
            out.data_ptr(),
            rows,
            None if updates is None else updates.rows,
            0 if updates is None else updates.count,
            None if updates is None else updates.room.data_ptr(),
            torch.get_num_threads(),
        )
        return out

    def updated(self, module: nn.Linear, x: torch.Tensor, name: str, found: list[Segment]) -> torch.Tensor:
        """The same with the updates that the segments `found` have for the site `name`."""
        if found is not self._found:
            self._found = found
            self._updates.clear()
        updates = self._updates.get(name)
        if updates is None:
            updates = self._updates[name] = _updates(name, found, x)
        out = self(module, x, updates)
        for s, bias in updates.biased:
            out[0, s.start : s.stop] += bias
        return out


def _looked_up(forward: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    return forward(ids).float()


def matrix(module: nn.Linear) -> Matrix:
    """A linear layer as the kernels take it. Its tensors have to live, and stay where they are, while it is used."""
    weight, bias = module.weight, module.bias
    return Matrix(
        weight.data_ptr(), None if bias is None else bias.data_ptr(), weight.shape[1], weight.shape[0],
        library.TYPES[weight.dtype],
    )  # fmt: skip


def pair(found: LoraPair | None) -> Pair:
    """An update as the kernels take it; the same holds of its tensors."""
    if found is None:
        return Pair(None, None, 0, 0.0)
    return Pair(found.a.data_ptr(), found.b.data_ptr(), found.a.shape[0], found.scaling)


def _updates(name: str, found: list[Segment], x: torch.Tensor) -> _Updates:
    here = [(s, p) for s in found if (p := s.adapter.pairs.get(name)) is not None]
    pairs, rows = (Pair * len(here))(), (Rows * len(here))()
    for i, (s, p) in enumerate(here):
        pairs[i] = pair(p)
        rows[i] = Rows(s.start, s.stop, ctypes.pointer(pairs[i]))
    room = x.new_empty(x.shape[1] * max((p.a.shape[0] for _, p in here), default=0))
    biased = [(s, bias) for s in found if (bias := s.adapter.bias.get(name)) is not None]
    return _Updates(rows, len(here), pairs, room, biased)
