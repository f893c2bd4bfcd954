"""worker.ift with a clock: what job.py puts in the recipe's place, loaded by the task after Unsloth."""

from __future__ import annotations

import atexit

from benchmarks.training.clock import install
from worker.ift import run

__all__ = ["run"]
atexit.register(install().write)
