"""Linear layers on a CPU: linear.c, compiled once a machine, and its call.

torch computes a few rows with kernels made for many (in float32 two rows take twice as long as one) or, in 16 bits without
hardware for them, row by row. Here every weight is read once, in the type it is held in: weights of 16 bits take half the
time of float32's, and nothing is lost, since they are exact in the float32 in which all is computed.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import linear

if TYPE_CHECKING:
    from worker.engine.lora import Segment

log = logging.getLogger("lorry.engine")
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_SOURCE = Path(__file__).with_name("linear.c")
_FLAGS = ["-O3", "-march=native", "-std=gnu11", "-fPIC"]


class _Segment(ctypes.Structure):
    _fields_ = (
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("start", ctypes.c_int64),
        ("stop", ctypes.c_int64),
        ("rank", ctypes.c_int64),
        ("scaling", ctypes.c_float),
    )


@dataclass(frozen=True, slots=True)
class _Updates:
    """A site's updates as the kernel takes them: a C array, and room for what they compute on the way."""

    segments: Any
    count: int
    room: torch.Tensor
    biased: list[tuple[Segment, torch.Tensor]]


class CpuLinear:
    """The kernel. Raises OSError where it cannot be compiled or loaded."""

    most_rows = 24  # from here on torch's products of matrices are as fast

    def __init__(self) -> None:
        self._linear = _library().lorry_linear
        self._found: list[Segment] = []
        self._updates: dict[str, _Updates] = {}  # for the segments in _found, by site

    @staticmethod
    def takes(module: nn.Module) -> bool:
        """Whether it computes this module: a plain linear layer."""
        return type(module) is nn.Linear and module.weight.dtype in _TYPES and module.weight.is_contiguous()

    @staticmethod
    def widen(model: nn.Module) -> None:
        """Make everything float32 but the matrices of plain linear layers and embeddings, which keep the type they came in."""
        plain = (nn.Linear, nn.Embedding)
        keep = {id(m.weight) for m in model.modules() if type(m) in plain}
        # Scaled embeddings (Gemma's) round by their own type.
        keep -= {id(p) for m in model.modules() if type(m) not in plain for p in m.parameters(recurse=False)}
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point() and (id(tensor) not in keep or tensor.dtype not in _TYPES):
                tensor.data = tensor.data.float()
        for module in model.modules():
            if type(module) is nn.Embedding and module.weight.dtype != torch.float32:
                module.register_forward_hook(lambda _module, _ids, found: found.float())

    def __call__(self, module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        """`module`'s output. x [1, rows, in], float32."""
        if x.shape[1] > self.most_rows:
            return linear(x, module.weight.to(x.dtype), module.bias)
        return self._call(module, x)

    def updated(self, module: nn.Linear, x: torch.Tensor, name: str, found: list[Segment]) -> torch.Tensor:
        """The same with the updates that the segments `found` have for the site `name`. At most `most_rows` rows."""
        if found is not self._found:
            if found != self._found:  # a batch's next step mostly has the same
                self._updates.clear()
            self._found = found
        updates = self._updates.get(name)
        if updates is None:
            updates = self._updates[name] = _updates(name, found, x)
        out = self._call(module, x, updates)
        for s, bias in updates.biased:
            out[0, s.start : s.stop] += bias
        return out

    def _call(self, module: nn.Linear, x: torch.Tensor, updates: _Updates | None = None) -> torch.Tensor:
        x = x.contiguous()
        weight, bias = module.weight, module.bias
        rows, (width, inner) = x.shape[1], weight.shape
        out = x.new_empty(1, rows, width)
        self._linear(
            x.data_ptr(),
            weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            out.data_ptr(),
            rows,
            inner,
            width,
            _TYPES[weight.dtype],
            None if updates is None else updates.segments,
            0 if updates is None else updates.count,
            None if updates is None else updates.room.data_ptr(),
            torch.get_num_threads(),
        )
        return out


def _updates(name: str, found: list[Segment], x: torch.Tensor) -> _Updates:
    here = [(s, pair) for s in found if (pair := s.adapter.pairs.get(name)) is not None]
    array = (_Segment * len(here))()
    for i, (s, p) in enumerate(here):
        array[i] = _Segment(p.a.data_ptr(), p.b.data_ptr(), s.start, s.stop, p.a.shape[0], p.scaling)
    room = x.new_empty(x.shape[1] * max((p.a.shape[0] for _, p in here), default=0))
    biased = [(s, bias) for s in found if (bias := s.adapter.bias.get(name)) is not None]
    return _Updates(array, len(here), room, biased)


@cache
def _library() -> Any:
    """linear.c for this processor, kept in the user's cache. Raises OSError."""
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if compiler is None:
        raise OSError("there is no C compiler (gcc)")
    processor = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("model", "flags"))]
    key = hashlib.sha256("\n".join([_SOURCE.read_text(), compiler, *_FLAGS, *processor[:4]]).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorry"
    file = folder / f"linear-{key}.so"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as made:
            compiled, linked = f"{made}/linear.o", f"{made}/linear.so"
            _run(compiler, *_FLAGS, "-fopenmp", "-c", str(_SOURCE), "-o", compiled)
            # Not linked with -fopenmp: it uses the threads of the OpenMP that torch has loaded. Two kinds would wait for
            # each other, spinning.
            _run(compiler, "-shared", compiled, "-o", linked)
            os.replace(linked, file)
    library = ctypes.CDLL(str(file))
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.lorry_linear.argtypes = [
        pointer, pointer, pointer, pointer, number, number, number, ctypes.c_int, pointer, number, pointer, ctypes.c_int,
    ]  # fmt: skip
    library.lorry_linear.restype = None
    return library


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{command[0]} failed: {done.stderr.strip()[-500:]}")
