"""The queues of one installation: which one a job goes to, and which ones a worker listens to. No Redis here.

LORRY_QUEUE alone is the name of the queue for jobs without needs and of normal priority; the others add the need and the
priority to it: lorry:high, lorry:gpu, lorry:gpu:low, lorry:pool:vision:high.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

PRIORITIES = ("high", "normal", "low")  # the order in which a worker looks
NEEDS = ("any", "cpu", "gpu")
POOL_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")
POOL_RULE = "1 to 40 small letters, digits, '_' or '-', beginning with a letter or digit"
_POOL = "pool:"


def queue_of(base: str, spec: Mapping[str, Any]) -> str:
    """The queue of a job: `base` is LORRY_QUEUE; of the spec only `resources` and `priority` count.

    Specs stored before these fields existed have neither, and go where jobs without needs go.
    """
    resources = spec.get("resources") or {}
    pool, gpus = resources.get("pool"), resources.get("gpus")
    need = f"{_POOL}{pool}" if pool is not None else "any" if gpus is None else "gpu" if gpus else "cpu"
    return _name(base, need, spec.get("priority") or "normal")


def queues_of(base: str, needs: Iterable[str]) -> list[str]:
    """What a worker that serves `needs` listens to, in order: all of one priority before the next."""
    needs = list(needs)
    return [_name(base, need, priority) for priority in PRIORITIES for need in needs]


def pools_of(base: str) -> str:
    """What the names of all queues of pools begin with."""
    return f"{base}:{_POOL}"


def needs_of(text: str, *, gpu: bool) -> list[str]:
    """LORRY_WORKER_QUEUES as a list of needs in its order, each once; `gpu`: whether auto has a GPU to serve.

    auto serves a GPU's own jobs first, since no other machine can take them. Raises ValueError.
    """
    needs: list[str] = []
    for word in (w.strip() for w in text.split(",")):
        if word == "auto":
            needs += ["gpu", *NEEDS[:2]] if gpu else NEEDS[:2]
        elif word in NEEDS or (word.startswith(_POOL) and POOL_NAME.fullmatch(word.removeprefix(_POOL))):
            needs.append(word)
        else:
            raise ValueError(f"{word!r} is none of auto, {', '.join(NEEDS)} and pool:NAME (NAME: {POOL_RULE})")
    return list(dict.fromkeys(needs))


def sees_gpu(environ: Mapping[str, str] = os.environ, root: Path = Path("/")) -> bool:
    """Whether CUDA would find an NVIDIA GPU, by device files alone: asking CUDA itself would cost memory on the GPU.

    A driver makes /dev/nvidia0 and so on; WSL has /dev/dxg and a libcuda of its own. CUDA_VISIBLE_DEVICES hides all of
    them if its first entry names none (it is empty, or -1), NVIDIA_VISIBLE_DEVICES if it is void or none.
    """
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and not re.match(r"\s*(\d|GPU-|MIG-)", visible):
        return False
    if environ.get("NVIDIA_VISIBLE_DEVICES") in ("void", "none"):
        return False
    wsl = (root / "dev/dxg").exists() and (root / "usr/lib/wsl/lib/libcuda.so.1").exists()
    return wsl or any((root / "dev").glob("nvidia[0-9]*"))


def _name(base: str, need: str, priority: str) -> str:
    parts = [base, *([need] if need != "any" else []), *([priority] if priority != "normal" else [])]
    return ":".join(parts)
