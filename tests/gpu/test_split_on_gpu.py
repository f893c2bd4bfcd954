"""Split embeddings on a CUDA device: bitsandbytes' kernels over slices, memory, pause and resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.recipes import Run, cpt_spec, run_recipe
from worker import split_weights
from worker.split_weights import SplitWeights

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def spec_of(base: Path, **more: Any) -> dict[str, Any]:
    training = {
        **more,
        "max_steps": 12,
        "save_steps": 100,
        "embedding_learning_rate": 1e-5,
        "gradient_checkpointing": True,
    }
    return cpt_spec(base, model={"load_in_4bit": True}, training=training)


def embeddings(run: Run) -> dict[str, torch.Tensor]:
    return {k: v for k, v in load_file(run.adapter / "adapter_model.safetensors").items() if ".lora_" not in k}


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("bits", [32, 8])
def test_steps_equal_those_on_the_float32_matrix(bits: int, paged: bool) -> None:
    from bitsandbytes.optim import AdamW

    torch.manual_seed(0)
    start = torch.randn(9001, 1003, device="cuda") * 0.1  # over two slices, and ends within a block
    whole, halved = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    held = SplitWeights([halved])
    reference, ours = (AdamW([p], lr=1e-5, weight_decay=0.01, optim_bits=bits, is_paged=paged) for p in (whole, halved))
    held.attach(ours)
    for _ in range(10):
        halved.grad = (torch.randn_like(start) * 1e-3).bfloat16()
        whole.grad = halved.grad.float()
        reference.step()
        ours.step()
    assert torch.equal(held.whole(halved), whole.data.cpu())
    assert torch.equal(ours.state[halved]["state1"], reference.state[whole]["state1"])
    assert torch.equal(ours.state[halved]["state2"], reference.state[whole]["state2"])


def test_the_gpu_holds_half_of_what_float32_takes() -> None:
    parameter = nn.Parameter(torch.randn(1 << 24, device="cuda"))
    before = torch.cuda.memory_allocated()
    held = SplitWeights([parameter])
    assert before - torch.cuda.memory_allocated() == 2 * parameter.numel()
    assert held.low[parameter].is_pinned()


def test_a_run_learns_what_it_would_in_float32(
    base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = {}
    for enabled in (False, True):
        if not enabled:
            monkeypatch.setattr(split_weights, "wanted", lambda spec, args: False)
        else:
            monkeypatch.undo()
        runs[enabled] = run_recipe(spec_of(base), tmp_path / str(enabled), file=rows)
    dtypes = {g["dtype"] for g in runs[True].progress.records["optimizer"]["groups"]}
    assert split_weights.DTYPE in dtypes
    for step, loss in runs[False].progress.losses.items():
        assert runs[True].progress.losses[step] == pytest.approx(loss, abs=1e-2)
    before = load_file(base / "model.safetensors")
    for key, weight in embeddings(runs[True]).items():
        start = before[key.removeprefix("base_model.model.")].float()
        assert weight.dtype == torch.float32
        assert ((weight.bfloat16() == start.bfloat16()) & (weight != start)).any()


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit"])
def test_a_paused_run_goes_on_as_if_nothing_happened(base: Path, rows: Path, tmp_path: Path, optim: str) -> None:
    whole = run_recipe(spec_of(base, optim=optim), tmp_path / "whole", file=rows)
    paused = run_recipe(spec_of(base, optim=optim), tmp_path / "parts", file=rows, ask_at=(5, "pause"))
    resumed = run_recipe(spec_of(base, optim=optim), tmp_path / "parts", file=rows)
    got = paused.progress.losses | resumed.progress.losses
    for step, loss in whole.progress.losses.items():
        assert got[step] == pytest.approx(loss, abs=1e-2)
