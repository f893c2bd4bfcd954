"""`lorry worker`, with what its jobs import loaded before it forks them.

Lorry's own worker never does this: its parent stays small and free of CUDA. Here it makes a job start in tenths of a
second instead of tens on a busy machine, so that faults hit trainings and not imports.
"""

from __future__ import annotations

import importlib
import os

from service.settings import Settings
from worker import run, tasks

if __name__ == "__main__":
    settings = Settings()
    tasks.prepare_process(settings)
    os.environ["OMP_NUM_THREADS"] = "1"
    for module in ("unsloth", *tasks.RECIPES.values()):  # unsloth first: it patches transformers, trl and peft
        importlib.import_module(module)
    run.main()
