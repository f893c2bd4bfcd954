"""bitsandbytes' optimisers step without a wait for the GPU after each tensor, to the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from worker.optimizer import wait_less


def pair() -> list[Any]:
    from bitsandbytes.optim import AdamW

    made = []
    for _ in range(2):
        torch.manual_seed(0)
        made.append(AdamW([nn.Parameter(torch.randn(300)) for _ in range(3)], lr=1e-2))
    return made


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    from bitsandbytes.optim import optimizer as library

    seen: list[torch.Tensor] = []
    monkeypatch.setattr(library, "sync_gpu", seen.append)
    return seen


def step(optimizer: Any) -> None:
    torch.manual_seed(1)
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()


def test_no_tensor_is_waited_for_and_the_weights_are_the_same(waits: list[torch.Tensor]) -> None:
    plain, ours = pair()
    step(plain)
    assert len(waits) == 3  # what the library does
    wait_less(ours)
    step(ours)
    assert len(waits) == 3
    for a, b in zip(plain.param_groups[0]["params"], ours.param_groups[0]["params"], strict=True):
        assert torch.equal(a, b)
    step(plain)  # another optimiser of the process still waits
    assert len(waits) == 6


def test_a_failed_step_leaves_the_library_as_it_was(waits: list[torch.Tensor]) -> None:
    plain, ours = pair()
    wait_less(ours)
    ours.update_step = None
    with pytest.raises(TypeError):
        step(ours)
    step(plain)
    assert len(waits) == 3


def test_a_schedule_can_follow_it_and_another_optimiser_is_left_alone() -> None:
    _, ours = pair()
    wait_less(ours)
    schedule = torch.optim.lr_scheduler.LambdaLR(ours, lambda n: 1 / (1 + n))
    step(ours)
    schedule.step()
    assert schedule.get_last_lr() == [5e-3]
    other = torch.optim.AdamW([nn.Parameter(torch.randn(3))])
    wait_less(other)
    assert "step" not in vars(other)
