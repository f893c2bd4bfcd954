"""Which GPUs a worker owns: LORRY_GPUS, or all that CUDA would show. By names and device files alone, as queue_names.py."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from service.queue_names import sees_gpu

CPU = "cpu"  # a process without a GPU: for trying on a machine that has none
_NAME = re.compile(r"\d+|(?:GPU|MIG)-[0-9A-Za-z/-]+|cpu")


def check_gpus(text: str) -> str:
    """Accept what LORRY_GPUS may be. Raises ValueError."""
    if text != "auto":
        names = _names(text)
        if not names or not all(_NAME.fullmatch(name) for name in names):
            raise ValueError("auto, or GPUs as CUDA_VISIBLE_DEVICES names them, separated by commas: 0,1")
        if len(set(names) - {CPU}) < len([n for n in names if n != CPU]) or len({n == CPU for n in names}) > 1:
            raise ValueError(f"each GPU once, and {CPU} not among them: {text}")
    return text


def gpus_of(text: str, environ: Mapping[str, str] = os.environ, root: Path = Path("/")) -> list[str]:
    """The devices that LORRY_GPUS names; with auto those of CUDA_VISIBLE_DEVICES, or all of the machine's NVIDIA GPUs."""
    if text != "auto":
        return _names(text)
    if not sees_gpu(environ, root):
        return []
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return _names(visible)
    found = [path for path in (root / "dev").glob("nvidia*") if path.name.removeprefix("nvidia").isdecimal()]
    return [str(i) for i in range(max(1, len(found)))]


def _names(text: str) -> list[str]:
    return [name for part in text.split(",") if (name := part.strip())]
