"""kernels.c, compiled for this processor by the machine's C compiler and kept in the user's cache."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # of weights, as kernels.c numbers them
_SOURCE = Path(__file__).with_name("kernels.c")
_FLAGS = ["-O3", "-march=native", "-std=gnu11", "-fPIC", "-fno-math-errno"]
_POINTER, _NUMBER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float


class Pair(ctypes.Structure):
    """An adapter's update of one matrix; rank 0 for none."""

    _fields_ = (("a", _POINTER), ("b", _POINTER), ("rank", _NUMBER), ("scaling", _FLOAT))


class Rows(ctypes.Structure):
    """Rows start…stop-1 belong to the adapter of these pairs."""

    _fields_ = (("start", _NUMBER), ("stop", _NUMBER), ("pairs", ctypes.POINTER(Pair)))


class Matrix(ctypes.Structure):
    """A linear layer's weight [out, in] and bias."""

    _fields_ = (("w", _POINTER), ("bias", _POINTER), ("inner", _NUMBER), ("out", _NUMBER), ("type", _NUMBER))


@cache
def load() -> Any:
    """The compiled kernels. Raises OSError where there is no compiler, or it fails, or what it makes cannot be loaded."""
    torch.get_num_threads()  # torch's OpenMP is loaded: the kernels have none of their own
    compiler = shutil.which(os.environ.get("CC") or "cc") or shutil.which("gcc")
    if compiler is None:
        raise OSError("there is no C compiler")
    file = _folder() / f"kernels-{_key(compiler)}.so"
    try:
        if not _whole(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            _compile(compiler, file)
        library = ctypes.CDLL(str(file))
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        # There is nowhere to keep it.
        with tempfile.TemporaryDirectory() as made:
            _compile(compiler, Path(made) / "kept.so")
            library = ctypes.CDLL(f"{made}/kept.so")
    library.lorry_linear.argtypes = [_POINTER, _POINTER, _POINTER, _NUMBER, _POINTER, _NUMBER, _POINTER, _INT]
    library.lorry_layers.argtypes = [
        _POINTER, _POINTER, _POINTER, _POINTER, _NUMBER, _POINTER, _POINTER, _POINTER, _NUMBER, _INT,
    ]  # fmt: skip
    library.lorry_linear.restype = library.lorry_layers.restype = None
    return library


def _folder() -> Path:
    if cache_home := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache_home) / "lorry"
    try:
        return Path.home() / ".cache" / "lorry"
    except RuntimeError as error:
        raise PermissionError(errno.EACCES, str(error)) from error


def _whole(file: Path) -> bool:
    """Whether the file ends with its digest: a damaged library can kill the process that loads it."""
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        return False
    return data[-32:] == hashlib.sha256(data[:-32]).digest()


def _key(compiler: str) -> str:
    """What a compiled file depends on."""
    version = _run(compiler, "--version")
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    processor = {line for line in lines if line.startswith(("model", "flags", "CPU", "Features"))}
    parts = [_SOURCE.read_text(), compiler, version, *_FLAGS, *sorted(processor)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _compile(compiler: str, file: Path) -> None:
    """Beside its place, then renamed: other processes find all of it or nothing."""
    with tempfile.TemporaryDirectory(dir=file.parent) as made:
        compiled, linked = f"{made}/kernels.o", f"{made}/kernels.so"
        _run(compiler, *_FLAGS, "-fopenmp", "-c", str(_SOURCE), "-o", compiled)
        # Not linked with -fopenmp: it uses the threads of the OpenMP that torch has loaded. Those of another one would
        # wait beside them, spinning.
        _run(compiler, "-shared", compiled, "-o", linked)
        with open(linked, "r+b") as library:
            library.write(hashlib.sha256(library.read()).digest())  # behind the end, where no loader looks
            library.flush()
            os.fsync(library.fileno())
        os.replace(linked, file)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{command[0]} failed: {done.stderr.strip()[-500:]}")
    return done.stdout
