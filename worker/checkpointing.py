"""Whether a run keeps its activations or computes them again in the backward pass, and how large its passes then are.

Computing them again (gradient checkpointing, Chen et al. 2016, arXiv 1604.06174; Unsloth's form sends each layer's input to
the host) costs a forward pass: about a quarter of the speed. Kept, they want memory: passes are made as small as it takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from service.specs import CptSpec, IftSpec
from worker.memory import GIB, NoEstimate, Shape, estimate, keeps_activations, pass_without


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
    if asked is True:
        return Checkpointing(True, None, "asked for")
    if asked == "auto" and gpu:
        # Not by the memory there is: without it the curve on a GPU leaves the script's by more than rounding does, for some
        # steps (docs/benchmarks.md). Until that is understood it is for those who ask.
        return Checkpointing(True, None, "the default on a GPU")
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
        tokens = pass_without(spec, shape, full, longest, free)
        found = estimate(spec, shape, tokens, checkpointing=False).bytes
    except NoEstimate as reason:
        return Checkpointing(False, None, str(reason))
    why = f"passes of {tokens} tokens: about {found / GIB:.1f} GiB of {free / GIB:.1f} free"
    return Checkpointing(False, tokens if tokens < full else None, why)
