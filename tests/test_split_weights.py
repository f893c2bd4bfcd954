"""Embeddings held as two 16-bit halves: exact to the bit, stepped as bitsandbytes steps the float32 matrix, saved whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from worker import split_weights
from worker.split_weights import SplitWeights, join, split


def every_kind_of_float32() -> torch.Tensor:
    """All exponents and signs, denormals, infinities and ties among them; no NaN."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (1_000_000,), generator=generator).to(torch.int32)
    tops = torch.arange(-32768, 32768, dtype=torch.int32) << 16
    some = torch.cat([bits, *(tops + rest for rest in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF))]).view(torch.float32)
    return some[~some.isnan()]


def test_halves_join_to_the_same_bits_and_the_high_one_is_a_nearest_bfloat16() -> None:
    weights = every_kind_of_float32()
    high, low = split(weights)
    assert high.dtype == torch.bfloat16
    assert low.dtype == torch.int16
    assert torch.equal(join(high, low).view(torch.int32), weights.view(torch.int32))
    tie = (weights.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(high[~tie].view(torch.int16), weights[~tie].bfloat16().view(torch.int16))
    to_even = weights[tie].bfloat16()
    finite = to_even.isfinite() & high[tie].isfinite()
    distance = [(x[finite].double() - weights[tie][finite].double()).abs() for x in (high[tie], to_even)]
    assert torch.equal(*distance)


def test_a_nan_is_seen_in_both_halves() -> None:
    bits = torch.tensor([0x7FFFFFFF, 0x7F800001, 0x7FC00000, -1, -0x7FFFFF], dtype=torch.int32)
    high, low = split(bits.view(torch.float32))
    assert high.isnan().all()
    assert join(high, low).isnan().all()


def optimizer_of(parameters: list[nn.Parameter], bits: int) -> Any:
    from bitsandbytes.optim import AdamW

    return AdamW(parameters, lr=1e-5, weight_decay=0.01, optim_bits=bits)


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("shape", [(40, 256), (41, 100)])  # the second ends within a block
def test_steps_equal_those_on_the_float32_matrix(
    bits: int, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(split_weights, "SLICE", 1024)  # several slices, the last one short
    torch.manual_seed(0)
    start = torch.randn(shape) * 0.1
    whole, halved, other = (nn.Parameter(x) for x in (start.clone(), start.clone(), torch.randn(5000)))
    plain = nn.Parameter(other.detach().clone())
    held = SplitWeights([halved])
    reference, ours = optimizer_of([whole, plain], bits), optimizer_of([halved, other], bits)
    held.attach(ours)
    for _ in range(20):
        gradient = (torch.randn(shape) * 1e-3).bfloat16()
        whole.grad, halved.grad = gradient.float(), gradient
        plain.grad = torch.randn(5000)
        other.grad = plain.grad.clone()
        reference.step()
        ours.step()
    assert torch.equal(held.whole(halved), whole.data)
    assert torch.equal(other.data, plain.data)
    assert halved.dtype == torch.bfloat16
    for key, value in reference.state[whole].items():
        got = ours.state[halved][key]
        assert torch.equal(got, value) if isinstance(value, torch.Tensor) else got == value, key
    assert set(ours.state) == {halved, other}  # the slices leave nothing behind
    moved = (whole.data - start).abs()
    assert moved.max() < 1e-3
    assert (moved > 0).float().mean() > 0.9
    assert (halved.data == start.bfloat16()).float().mean() > 0.5  # steps that bfloat16 alone would have lost


def test_clipping_measures_in_float32_and_scales_once() -> None:
    torch.manual_seed(0)
    halved, other = nn.Parameter(torch.randn(300, 64)), nn.Parameter(torch.randn(64))
    held = SplitWeights([halved])
    halved.grad, other.grad = torch.randn(300, 64).bfloat16(), torch.randn(64)
    whole = [nn.Parameter(torch.zeros(300, 64)), nn.Parameter(torch.zeros(64))]
    whole[0].grad, whole[1].grad = halved.grad.float(), other.grad.clone()
    want = nn.utils.clip_grad_norm_(whole, 1.0)
    before = halved.grad.clone()
    assert held.clip([halved, other], 1.0) == pytest.approx(float(want), rel=1e-6)
    assert torch.equal(halved.grad, before)
    assert held.gradient_scale is not None
    torch.testing.assert_close(halved.grad.float() * held.gradient_scale, whole[0].grad)
    torch.testing.assert_close(other.grad, whole[1].grad)


def test_joined_parameters_are_float32_and_can_be_loaded_into() -> None:
    start, loaded = torch.randn(30, 16), torch.randn(30, 16)
    parameter = nn.Parameter(start.clone())
    held = SplitWeights([parameter])
    with held.joined():
        assert torch.equal(parameter.data, start)
    assert torch.equal(held.whole(parameter), start)
    with held.joined(take_back=True):
        parameter.data.copy_(loaded)
    assert parameter.dtype == torch.bfloat16
    assert torch.equal(held.whole(parameter), loaded)


def test_an_optimiser_that_is_not_bitsandbytes_is_refused() -> None:
    parameter = nn.Parameter(torch.randn(4))
    with pytest.raises(TypeError, match="AdamW"):
        SplitWeights([parameter]).attach(torch.optim.AdamW([parameter]))
