"""Whether a run keeps its activations or computes them again in the backward pass, chosen by the memory there is.

Computing them again (gradient checkpointing, Chen et al. 2016, arXiv 1604.06174; Unsloth's form sends each layer's input to
the host) costs a forward pass: about a quarter of the speed. Where the device has room for the activations, that is
wasted; and where it has room for those of a smaller pass, smaller passes are still faster.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from service.specs import CptSpec, IftSpec
from worker.memory import CONTEXT_BYTES, GIB, NoEstimate, Shape, estimate, keeps_activations

SMALLEST_PASS = 4096  # tokens; below, the GPU is not filled and the weights are dequantised too often
STEP = 1024
ROOM = 0.85  # of what is free: the allocator loses some between its blocks, and an engine beside the job wants some


@dataclass(frozen=True)
class Checkpointing:
    """`used`, the most `tokens` that a pass may have for it (None: as the spec's batch says), and why."""

    used: bool
    tokens: int | None
    why: str


def choose(spec: CptSpec | IftSpec, config: Any, longest: int, free: int, *, gpu: bool) -> Checkpointing:
    """For a run whose longest row has `longest` tokens, on a device with `free` bytes before the model is there."""
    asked, window = spec.training.gradient_checkpointing, spec.model.max_seq_length
    longest = min(longest, window)
    if isinstance(asked, bool):
        return Checkpointing(asked, None, "asked for")
    try:
        shape = Shape.of(config)
    except NoEstimate as reason:
        return Checkpointing(True, None, str(reason))
    rows = int(spec.training.per_device_train_batch_size)
    if not gpu:
        kept = keeps_activations(shape, rows * longest, free)
        return Checkpointing(not kept, None, "activations would take a quarter of the free memory" if not kept else "")
    packed = spec.training.packing is not False
    full = rows * (window if packed else longest)
    tokens = largest_pass(spec, shape, full, max(longest, min(full, SMALLEST_PASS)), int(ROOM * free))
    if tokens is None:
        needed = estimate(spec, shape, max(longest, min(full, SMALLEST_PASS)), checkpointing=False).bytes
        return Checkpointing(True, None, f"without it a run would take {needed / GIB:.1f} GiB of {free / GIB:.1f} free")
    found = estimate(spec, shape, tokens, checkpointing=False).bytes
    why = f"passes of {tokens} tokens fit: about {found / GIB:.1f} GiB of {free / GIB:.1f} free"
    return Checkpointing(False, tokens if tokens < full else None, why)


def largest_pass(spec: CptSpec | IftSpec, shape: Shape, most: int, least: int, free: int) -> int | None:
    """Tokens of the largest pass that fits without checkpointing, from `least` to `most`; None if not even `least` does.

    Raises NoEstimate for target modules that the shape does not have.
    """
    for tokens in (most, *range((most - 1) // STEP * STEP, least - 1, -STEP), least):
        if estimate(spec, shape, tokens, checkpointing=False).bytes + CONTEXT_BYTES["cuda"] <= free:
            return int(tokens)
    return None
