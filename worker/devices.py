"""The devices of one job, out of those its worker owns, and the host's memory. No torch here: it must find them chosen."""

from __future__ import annotations

import os
from pathlib import Path

from service.errors import JobFailure
from service.gpus import CPU, gpus_of
from service.settings import Settings
from service.specs import CptSpec, ExportSpec, IftSpec


def take_devices(spec: CptSpec | IftSpec | ExportSpec, settings: Settings) -> list[str]:
    """One device for each process of a job's training; this process is left with the first.

    None where the worker owns no GPU: the CPU then. Raises JobFailure if the job asks for more than there are.
    """
    owned, asked = gpus_of(settings.gpus), spec.resources.gpus or 1
    if asked > max(1, len(owned)):
        raise JobFailure(
            "unsupported",
            f"resources.gpus: the job asks for {asked} GPUs, and the worker that took it has {len(owned)} "
            "(LORRY_GPUS, or lorry worker --gpus); resources.pool sends a job to workers of your choice",
        )
    if owned and owned[0] != CPU:
        os.environ["CUDA_VISIBLE_DEVICES"] = owned[0]
    return owned[: 1 if isinstance(spec, ExportSpec) else asked]


def free_host_memory(root: Path = Path("/")) -> int:
    """Bytes of this host's memory that a process can have without swapping; in a container (cgroup v2), of its limit."""
    lines = (root / "proc/meminfo").read_text("ascii").splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    group = root / "sys/fs/cgroup"
    try:
        most, used = (int((group / f"memory.{what}").read_text("ascii")) for what in ("max", "current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text("ascii").splitlines())
    except (OSError, ValueError):  # no such limit; "max" is none
        return free
    # Pages of files that nobody has read lately count as used, but are given back when they are needed.
    return min(free, max(0, most - used + int(stat.get("inactive_file", 0))))
