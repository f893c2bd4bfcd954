"""What a training may have of the device's memory, asked without making a CUDA context, which would take some of it."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from typing import Any

from service.queue_names import sees_gpu
from worker.memory import CONTEXT_BYTES, GIB, Device

_SMI_SECONDS = 20


@dataclass(frozen=True)
class Budget:
    """A device and its memory. `free_bytes` is None where nobody has told of it; `of` says whose it is."""

    device: Device
    name: str | None
    free_bytes: int | None
    of: str

    @property
    def room(self) -> int:
        """Bytes for the run's own tensors; 80 GiB for a device that is not known."""
        return (80 * GIB if self.free_bytes is None else self.free_bytes) - CONTEXT_BYTES[self.device]

    def report(self) -> dict[str, Any]:
        return {"device": self.device, "name": self.name, "free_bytes": self.free_bytes, "of": self.of}


def budget_of(gpus: int | None, last: dict[str, Any] | None, fraction: float = 1.0) -> Budget:
    """The device that a job will meet: this host's GPU; else that of the newest run, `last`; else this host's memory.

    `gpus` is resources.gpus of its spec, `fraction` what LORRY_TRAIN_MEMORY_FRACTION leaves a job of a GPU. A device
    elsewhere counts with all of its memory, since nobody knows what is free there.
    """
    if gpus != 0 and sees_gpu():
        name, free, total = _smi()
        return Budget("cuda", name, None if free is None else min(free, int(fraction * total)), "this host")
    on_gpu = last is not None and last.get("type") == "cuda"
    if gpus != 0 and (on_gpu or gpus):
        if last is None or not on_gpu:
            return Budget("cuda", None, None, "unknown: no run on this base has told of its GPU")
        whole = last.get("memory_bytes")
        free = None if whole is None else int(fraction * whole)
        return Budget("cuda", last.get("name"), free, "the device of the newest run on this base")
    import psutil

    return Budget("cpu", None, int(psutil.virtual_memory().available), "this host")


def _smi() -> tuple[str | None, int | None, int]:
    """Name, free bytes and all bytes of the first visible GPU; None and 0 for what the driver's tool does not say."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip() or "0"
    command = [
        "nvidia-smi",
        f"--id={first}",
        "--query-gpu=name,memory.free,memory.total",
        "--format=csv,noheader,nounits",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SMI_SECONDS, check=True)
        name, free, total = done.stdout.strip().splitlines()[0].rsplit(",", 2)
        return name.strip(), int(free) * 2**20, int(total) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None, None, 0
