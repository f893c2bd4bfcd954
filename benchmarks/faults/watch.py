"""What the processes really do, seen from outside: which of them train which job, and whether two ever do at once."""

from __future__ import annotations

import os
import re
import threading
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.faults.parts import Site

_LOG = re.compile(r"jobs/(job_[0-9a-f]{24})/log\.txt$")
_TICKS = os.sysconf("SC_CLK_TCK")
ALLOWED = 1.0  # processor seconds a fenced run may use until the end of its step, where it learns that it is fenced


@dataclass
class Seen:
    """A job's process: what it is at, and the processor time that it used while a later one trained the same job."""

    pid: int
    job: str | None = None
    training: bool = False  # it has TensorBoard's file open: from the first step to the last
    began: int = 0  # order in which processes began to train
    ticks: int = 0
    beside: int = 0


@dataclass
class Watcher:
    """Samples the workers' children a few times a second."""

    here: Site
    seen: dict[int, Seen] = field(default_factory=dict)
    trainings: int = 0  # runs that took steps
    overlaps: list[str] = field(default_factory=list)

    def run(self, stop: threading.Event) -> None:
        while not stop.wait(0.2):
            self.sample()

    @property
    def training(self) -> list[Seen]:
        return [s for s in list(self.seen.values()) if s.training]

    def sample(self) -> None:
        for worker in self.here.workers:
            for pid in self.here.children(worker):
                self.seen.setdefault(pid, Seen(pid))
        for pid in list(self.seen):
            if not self._look(self.seen[pid]):
                self._settle(self.seen.pop(pid))

    def _look(self, seen: Seen) -> bool:
        """Whether it lives."""
        proc = Path(f"/proc/{seen.pid}")
        try:
            fields = (proc / "stat").read_text().rsplit(")", 1)[1].split()
            if fields[0] in "ZX":
                return False
            open_files = [os.readlink(f) for f in (proc / "fd").iterdir() if f.is_symlink()]
        except OSError:
            return proc.exists()
        ticks = int(fields[11]) + int(fields[12])
        if match := next((m for f in open_files if (m := _LOG.search(f))), None):
            seen.job = match[1]
        training = any("/tensorboard/" in f for f in open_files)
        if training and not seen.training:
            self.trainings += 1
            seen.began = self.trainings
        seen.training = training
        later = [s for s in self.seen.values() if s.training and s.job == seen.job and s.began > seen.began]
        if training and later:
            seen.beside += ticks - seen.ticks
        seen.ticks = ticks
        return True

    def _settle(self, seen: Seen) -> None:
        if seen.beside > ALLOWED * _TICKS:
            seconds = seen.beside / _TICKS
            self.overlaps.append(f"{seen.job}: process {seen.pid} trained {seconds:.1f} s beside its successor")
