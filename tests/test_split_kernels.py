"""The kernels around the optimiser's step on split embeddings: the same bits as tensor operations. On a CUDA device as they
are, else interpreted on the CPU. Skipped without Triton."""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined
pytest.importorskip("triton")
pytest.importorskip("numpy")

from tests.test_split_weights import every_kind_of_float32  # noqa: E402
from worker.split_kernels import join_slice, split_slice  # noqa: E402
from worker.split_weights import join, split  # noqa: E402


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def test_halves_are_those_of_tensor_operations() -> None:
    weights = every_kind_of_float32()[-200_001:].to(DEVICE)
    high, low = split(weights)
    got_high, got_low = torch.zeros_like(high), torch.zeros_like(low)
    split_slice(weights, got_high, got_low)
    assert torch.equal(got_high.view(torch.int16), high.view(torch.int16))
    assert torch.equal(got_low, low)
    gradient = torch.randn(len(weights), device=DEVICE).bfloat16()
    joined, gradients = join_slice(high, low, gradient, None)
    assert same_bits(joined, weights)
    assert same_bits(joined, join(high, low))
    assert same_bits(gradients, gradient.float())


def test_a_gradient_is_scaled_in_float32() -> None:
    high, low = split(torch.randn(5000, device=DEVICE))
    scale = torch.tensor(0.3, device=DEVICE)
    for gradient in (torch.randn(5000, device=DEVICE).bfloat16(), torch.randn(5000, device=DEVICE)):
        _, gradients = join_slice(high, low, gradient, scale)
        assert same_bits(gradients, gradient.float() * scale)


def test_a_nan_is_kept() -> None:
    bits = torch.tensor([0x7FFFFFFF, 0x7F800001, 0x7FC00000, -1, -0x7FFFFF], dtype=torch.int32, device=DEVICE)
    high, low = torch.zeros(5, dtype=torch.bfloat16, device=DEVICE), torch.zeros(5, dtype=torch.int16, device=DEVICE)
    split_slice(bits.view(torch.float32), high, low)
    assert join(high, low).isnan().all()
