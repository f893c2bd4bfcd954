"""Whether a run keeps its activations or computes them again in the backward pass, and how large its passes then are.

Computing them again (gradient checkpointing, Chen et al. 2016, arXiv 1604.06174; Unsloth's form sends each layer's input to
the host) costs a forward pass: about a quarter of the speed. Kept, they want memory: passes are made as small as it takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.specs import CptSpec, IftSpec
from worker.checkpoints import checkpoints_in, read_pending
from worker.memory import GIB, NoEstimate, Shape, keeps_activations, without_checkpointing


@dataclass(frozen=True)
class Checkpointing:
    """`used`, the most `tokens` that a pass may have for it (None: as the spec's batch says), and why."""

    used: bool
    tokens: int | None
    why: str


def choose(
    spec: CptSpec | IftSpec,
    config: Any,
    longest: int,
    free: int,
    *,
    gpu: bool,
    before: bool | None = None,
    frozen_adapter_bytes: int = 0,
) -> Checkpointing:
    """For a run whose longest row has `longest` tokens, on a device with `free` bytes before the model is there.

    `before`: what an earlier attempt at the run did (`of_checkpoints`). "auto" stays with it: Unsloth's checkpointing gives
    gradients a little different, and a resumed curve is to go on as it began.
    """
    asked, window = spec.training.gradient_checkpointing, spec.model.max_seq_length
    longest = min(longest, window)
    if asked is True:
        return Checkpointing(True, None, "asked for")
    if asked == "auto" and gpu and before is not None:
        if before:
            return Checkpointing(True, None, "as the run began")
        asked = False
    rows = int(spec.training.per_device_train_batch_size)
    if not gpu:
        intermediate = getattr(config, "intermediate_size", 4 * config.hidden_size)
        kept = asked is False or keeps_activations(
            config.hidden_size, intermediate, config.num_hidden_layers, rows * longest, free
        )
        return Checkpointing(not kept, None, "" if kept else "activations would take a quarter of the free memory")
    full = rows * (window if spec.training.packing is not False else longest)
    try:
        shape = Shape.of(config)
        found, fits = without_checkpointing(spec, shape, full, longest, free, frozen_adapter_bytes=frozen_adapter_bytes)
    except NoEstimate as reason:
        return Checkpointing(asked == "auto", None, str(reason))
    why = f"passes of {found.tokens} tokens: about {found.bytes / GIB:.1f} GiB of {free / GIB:.1f} free"
    if asked == "auto" and not fits:
        return Checkpointing(True, None, f"without it, {why}")
    return Checkpointing(False, found.tokens if found.tokens < full else None, why)


def of_checkpoints(folder: Path) -> bool | None:
    """Whether the run whose checkpoints these are used it; None where there are none, or older ones that do not say."""
    present = checkpoints_in(folder)
    used = read_pending(present[max(present)]).get("gradient_checkpointing") if present else None
    return used if isinstance(used, bool) else None
