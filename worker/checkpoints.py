"""A run's checkpoints on disk: which there are, what is in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from worker.files import folder_bytes

PENDING, STAGING = "lorry_trainer.json", ".staging"


def read_pending(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint left for the resumed run.

    loss_sum, last_logged_step, evaluation_due, finished, gradient_checkpointing, capacity.
    """
    pending: dict[str, Any] = json.loads((checkpoint / PENDING).read_text())
    return pending


def trainable_part(folder: Path) -> Path:
    """Where a checkpoint keeps what a resumed run loads: a stacked adapter's folder holds the sum, this the second half."""
    part = folder / "trainable"
    return part if part.is_dir() else folder


def checkpoints_in(folder: Path) -> dict[int, Path]:
    """Whole checkpoints by step; a folder gets its name only when all is in it."""
    if not folder.is_dir():
        return {}
    named = {p.name.removeprefix("checkpoint-"): p for p in folder.iterdir() if p.name.startswith("checkpoint-")}
    return {int(step): path for step, path in named.items() if step.isdecimal()}


def describe_checkpoints(folder: Path) -> dict[int, dict[str, Any]]:
    """path, loss, eval_loss and bytes of each checkpoint, from its own trainer_state.json."""
    out = {}
    for step, path in checkpoints_in(folder).items():
        history = json.loads((path / "trainer_state.json").read_text())["log_history"]
        losses = [h["loss"] for h in history if "loss" in h]
        evals = [h["eval_loss"] for h in history if "eval_loss" in h and h["step"] == step]
        out[step] = {
            "path": str(path),
            "loss": losses[-1] if losses else None,
            "eval_loss": evals[-1] if evals else None,
            "bytes": folder_bytes(path),
        }
    return out
