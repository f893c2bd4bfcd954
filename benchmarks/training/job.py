#!/usr/bin/env python3
"""Run one queued job as a worker's child does, with a clock on its trainer.

    LORRY_DATA_DIR=… python benchmarks/training/job.py JOB_ID

The task is the worker's own, from the claim to the stored outcome; only the recipe's module is one that adds the clock.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from worker import tasks

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", help="id of a queued job")
    tasks.RECIPES |= {kind: f"benchmarks.training.timed_{kind}" for kind in ("cpt", "ift")}
    tasks.run_job(parser.parse_args().job)
