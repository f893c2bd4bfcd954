"""Whether rows may be packed: asked of the model itself, before the first step.

Unsloth keeps packed rows apart with the best kernel there is (flash-attn, xformers, torch's varlen attention), but not
for every architecture, and a mixer that carries a state along would leak it from row to row without a word. So a row is
computed behind two different neighbours: its logits must be the very same, bit by bit.
"""

from __future__ import annotations

from typing import Any

import torch

from service.errors import JobFailure
from worker.model import on_gpu
from worker.varlen import provide_varlen_attention
from worker.verify_math import device_of

# Alone and behind a neighbour a row takes other kernels: equal up to the rounding of bfloat16 through all layers.
TOLERANCE = {torch.bfloat16: 0.1, torch.float16: 0.05, torch.float32: 1e-3}


def choose_packing(asked: bool | str, model: Any) -> dict[str, Any]:
    """What to record: `asked`, `used`, and `why` it is not used. Prepares the model for packed passes.

    "auto" packs on a GPU. On a CPU there is no kernel that skips what lies between rows, so a packed pass is slower the
    longer it is; with True it is exact there all the same. Raises JobFailure("unsupported") for True where the model
    does not keep rows apart.
    """
    if asked is False:
        return {"asked": asked, "used": False}
    if asked == "auto" and not on_gpu():
        return {"asked": asked, "used": False, "why": "no kernel for packed rows on a CPU"}
    if on_gpu():
        from unsloth.utils.packing import (
            mark_allow_overlength,  # only there: Unsloth's CPU backend has no models of its own
        )

        provide_varlen_attention()
        mark_allow_overlength(model)  # or Unsloth would cut a pass at max_seq_length, which holds for each row of it
    why = leak(model)
    if why is None:
        return {"asked": asked, "used": True}
    if asked is True:
        raise JobFailure("unsupported", f"training.packing: {why}; use 'auto' or false")
    return {"asked": asked, "used": False, "why": why}


@torch.no_grad()  # type: ignore[untyped-decorator]
def leak(model: Any) -> str | None:
    """Why rows packed into one pass of `model` would see one another; None if they do not."""
    was_training = model.training
    device = device_of(model)
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    generator = torch.Generator().manual_seed(0)
    first, other, row = (torch.randint(0, vocabulary, (n,), generator=generator) for n in (37, 37, 53))

    def logits(*rows: torch.Tensor) -> torch.Tensor:
        """[len(last row), vocabulary]"""
        inputs = {"input_ids": torch.cat(rows)[None].to(device), "use_cache": False}
        if len(rows) > 1:
            lengths = [len(r) for r in rows]
            inputs["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None].to(device)
            inputs["packed_seq_lengths"] = torch.tensor(lengths, dtype=torch.int32)
        with torch.autocast(device.type, model.dtype, enabled=model.dtype != torch.float32):
            return model(**inputs).logits[0, -len(rows[-1]) :].float()

    model.eval()
    try:
        behind_first, behind_other, alone = logits(first, row), logits(other, row), logits(row)
    except (TypeError, ValueError, NotImplementedError) as error:
        return f"this model takes no packed rows ({str(error).splitlines()[0]})"
    finally:
        model.train(was_training)
    if not torch.equal(behind_first, behind_other):
        return "this model lets packed rows see one another"
    difference = (behind_first - alone).norm() / alone.norm()
    if not difference <= TOLERANCE.get(model.dtype, 1e-3):
        return f"this model's packed rows come out otherwise than alone (logits differ by {float(difference):.1e})"
    return None
