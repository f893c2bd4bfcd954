"""Trained embedding matrices as two 16-bit halves: the model computes with one, the optimiser's step sees both.

A float32 weight w is held as `high`, a nearest bfloat16 (what autocast would make of w), and `low`, the signed rest of
its bits, which waits in the host's memory. Only the optimiser's step joins them, so weights and updates have float32's
precision while the GPU holds bfloat16 and gradients are bfloat16. See docs/decisions/0019-split-embeddings.md.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import nn

from service.specs import CptSpec, IftSpec
from worker.memory import splits_embeddings

SLICE = 1 << 24  # weights joined at a time: 64 MiB in float32, and a multiple of bitsandbytes' blocks of 256
BLOCK = 256  # weights that share one absmax of an 8-bit state
DTYPE = "float32 (bfloat16 + 16 bits)"  # for the record
PER_WEIGHT, PER_BLOCK = ("state1", "state2"), ("absmax1", "absmax2")
NAN = 0x7FC00000


def wanted(spec: CptSpec | IftSpec, args: Any) -> bool:
    """Whether a run holds its embeddings split: where memory is short enough for gradient checkpointing."""
    return bool(torch.cuda.is_available() and args.bf16 and splits_embeddings(spec, args.gradient_checkpointing))


def split(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 of any shape → (nearest bfloat16, int16 rest). `join` gives the same bits back; a NaN stays some NaN.

    A tie goes away from zero: to even, as torch rounds, it would leave rests from -32768 to +32768, one too many.
    """
    bits = torch.where(weights.isnan(), NAN, weights.view(torch.int32))
    top = (bits + 0x8000) >> 16
    return top.to(torch.int16).view(torch.bfloat16), (bits - (top << 16)).to(torch.int16)


def join(high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """The float32 that `split` took apart."""
    return ((high.view(torch.int16).to(torch.int32) << 16) + low.to(torch.int32)).view(torch.float32)


class SplitWeights:
    """The low halves of some parameters, whose `.data` are the high halves, and the optimiser's step over both."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        """Split float32 parameters in place. The low halves of those on a GPU go to the host, page-locked."""
        self.low: dict[nn.Parameter, torch.Tensor] = {}
        on_gpu = any(parameter.is_cuda for parameter in parameters)
        self.kernels = _kernels() if on_gpu else None
        self.stream = torch.cuda.Stream() if on_gpu else None  # takes halves back while the next pass is computed
        self.gradient_scale: torch.Tensor | None = None  # what clipping asks for; applied once, within the next step
        self.order: list[nn.Parameter] = []  # in which the optimiser comes to them
        # Low halves on their way to the GPU, and what tells that each slice has arrived.
        self._fetched: dict[nn.Parameter, tuple[torch.Tensor, list[torch.cuda.Event]]] = {}
        for parameter in parameters:
            whole = parameter.data.contiguous()
            parameter.data = torch.empty_like(whole, dtype=torch.bfloat16)
            self.low[parameter] = torch.empty(whole.shape, dtype=torch.int16, device="cpu", pin_memory=whole.is_cuda)
            self._put(parameter, whole)

    def _fetch(self, parameter: nn.Parameter) -> None:
        """Send the low half to the GPU, slice by slice, beside what it computes."""
        if self.stream is None or parameter in self._fetched:
            return
        held, low = self.low[parameter].view(-1), torch.empty_like(self.low[parameter], device=parameter.device)
        self.stream.wait_stream(torch.cuda.current_stream())  # which may still use what was in this memory
        arrived = []
        with torch.cuda.stream(self.stream):
            for start in range(0, held.numel(), SLICE):
                low.view(-1)[start : start + SLICE].copy_(held[start : start + SLICE], non_blocking=True)
                arrived.append(self.stream.record_event())
        low.record_stream(self.stream)
        self._fetched[parameter] = low, arrived

    def _put(self, parameter: nn.Parameter, whole: torch.Tensor) -> None:
        high, low, source = parameter.data.view(-1), self._arrived(parameter).view(-1), whole.reshape(-1)
        self._fetched.clear()
        for start in range(0, source.numel(), SLICE):
            at = slice(start, start + SLICE)
            high[at], rest = split(source[at].to(high.device, torch.float32))
            low[at] = rest.cpu()

    def _arrived(self, parameter: nn.Parameter) -> torch.Tensor:
        """The low half on the host, after what the last step sent there."""
        if self.stream is not None:
            self.stream.synchronize()
        return self.low[parameter]

    def whole(self, parameter: nn.Parameter) -> torch.Tensor:
        """The float32 matrix, on the CPU: there it takes no memory that the training needs."""
        high, low = parameter.data.view(-1), self._arrived(parameter).view(-1)
        out = torch.empty(high.numel(), dtype=torch.float32)
        for start in range(0, high.numel(), SLICE):
            at = slice(start, start + SLICE)
            out[at] = join(high[at].cpu(), low[at])
        return out.view(parameter.shape)

    @contextmanager
    def joined(self, *, take_back: bool = False) -> Iterator[None]:
        """Within, the parameters are float32 matrices on the CPU: to be saved, or, with `take_back`, to be loaded into."""
        highs = {parameter: parameter.data for parameter in self.low}
        for parameter in self.low:
            parameter.data = self.whole(parameter)
        try:
            yield
        finally:
            for parameter, high in highs.items():
                loaded, parameter.data = parameter.data, high
                if take_back:
                    self._put(parameter, loaded)

    def attach(self, optimizer: Any) -> None:
        """Make a bitsandbytes optimiser with two states step over the joined weights of these parameters.

        Each slice goes through the optimiser's own update as a float32 parameter: its kernels work weight by weight
        (32-bit states) or block by block (8-bit ones), so slices give what the whole matrix would. Raises TypeError
        for another optimiser.
        """
        if not hasattr(optimizer, "update_step") or not hasattr(optimizer, "non_castable_tensor_keys"):
            raise TypeError(f"no optimiser of bitsandbytes: {type(optimizer).__name__}")
        update = optimizer.update_step
        self.order = [p for group in optimizer.param_groups for p in group["params"] if p in self.low]

        def update_step(group: Any, parameter: nn.Parameter, gindex: int, pindex: int) -> None:
            if parameter in self.low:
                self._step(optimizer, update, group, parameter, gindex, pindex)
            else:
                update(group, parameter, gindex, pindex)

        optimizer.update_step = update_step

    def _step(self, optimizer: Any, update: Any, group: Any, parameter: nn.Parameter, gindex: int, pindex: int) -> None:
        assert parameter.grad is not None
        self._fetch(parameter)  # unless clipping has
        low, arrived = self._fetched.pop(parameter, (self.low[parameter], []))
        high, low = parameter.data.view(-1), low.view(-1)
        gradient, state = parameter.grad.reshape(-1), optimizer.state[parameter]
        step = state["step"]
        for start in range(0, high.numel(), SLICE):
            end = min(start + SLICE, high.numel())
            at, blocks = slice(start, end), slice(start // BLOCK, -(-end // BLOCK))
            if arrived:
                torch.cuda.current_stream().wait_event(arrived[start // SLICE])
            weights, gradients = self._joined(high[at], low[at], gradient[at])
            part = nn.Parameter(weights, requires_grad=True)
            part.grad = gradients
            optimizer.state[part] = state | {
                **{key: _slice(state[key].view(-1), at, state[key]) for key in PER_WEIGHT if key in state},
                **{key: _slice(state[key], blocks, state[key]) for key in PER_BLOCK if key in state},
                "step": step,
            }
            try:
                update(group, part, gindex, pindex)
            finally:
                del optimizer.state[part]
            if self.kernels is not None:
                self.kernels.split_slice(part.data, high[at], low[at])
            else:
                high[at], low[at] = split(part.data)
        state["step"] = step + 1
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.low[parameter].view(-1).copy_(low, non_blocking=True)
            low.record_stream(self.stream)

    def _joined(
        self, high: torch.Tensor, low: torch.Tensor, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.kernels is not None:
            joined: tuple[torch.Tensor, torch.Tensor] = self.kernels.join_slice(
                high, low, gradient, self.gradient_scale
            )
            return joined
        gradients = gradient.float()
        return join(high, low), gradients if self.gradient_scale is None else gradients * self.gradient_scale

    def clip(self, parameters: Iterable[nn.Parameter], most: float) -> torch.Tensor:
        """The norm of all gradients, summed in float32; scales them so that it is at most `most`.

        As torch's clip_grad_norm_, but a bfloat16 gradient is not rounded again: its scale is applied in the next step.
        The backward pass is over, and its memory free: the low halves set out for the GPU.
        """
        for parameter in self.order:
            self._fetch(parameter)
        own = [p for p in parameters if p.grad is not None]
        norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float32) for p in own]
        norm = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.tensor(0.0)
        self.gradient_scale = (most / (norm + 1e-6)).clamp(max=1.0)
        nn.utils.clip_grads_with_norm_([p for p in own if p not in self.low], most, norm)
        return norm


def _kernels() -> ModuleType | None:
    try:
        return importlib.import_module("worker.split_kernels")
    except ImportError:  # no Triton: the same as tensor operations, slower
        return None


def _slice(values: torch.Tensor, at: slice, of: torch.Tensor) -> torch.Tensor:
    """Values of a state, marked as in unified memory if it is: bitsandbytes' kernels take nothing else from the host."""
    part = values[at]
    if getattr(of, "is_paged", False):
        part.is_paged, part.page_deviceid = True, of.page_deviceid
    return part


def embeddings_of(model: nn.Module) -> list[nn.Parameter]:
    """The fully trained embed_tokens and lm_head of a PEFT model."""
    names = ("embed_tokens.modules_to_save.default.weight", "lm_head.modules_to_save.default.weight")
    return [p for n, p in model.named_parameters() if p.requires_grad and n.endswith(names)]
