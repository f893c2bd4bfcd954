"""How two models are compared: next-token distributions over the same tokens. torch only, no Unsloth."""

from __future__ import annotations

from typing import Any

import torch


def device_of(model: Any) -> torch.device:
    """Where a model computes. One in training keeps frozen embeddings elsewhere, and they may be its first parameters."""
    parameters = list(model.parameters())
    device: torch.device = next((p for p in parameters if p.requires_grad), parameters[0]).device
    return device


def next_token_logprobs(model: Any, ids: list[int]) -> torch.Tensor:
    """Log-probabilities over the vocabulary at each position of one sequence: [len(ids), vocabulary], float32, on the CPU."""
    model.eval()
    with torch.no_grad():
        tokens = torch.tensor([ids], device=device_of(model))
        logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[0]
    return torch.log_softmax(logits.float(), -1).cpu()


def mean_kl(expected: torch.Tensor, got: torch.Tensor) -> float:
    """Mean over positions of KL(expected || got), in nats; both [positions, vocabulary] log-probabilities."""
    return float((expected.exp() * (expected - got)).sum(-1).mean())


def agreement(expected: torch.Tensor, got: torch.Tensor) -> float:
    """Fraction of positions at which both prefer the same token."""
    return float((expected.argmax(-1) == got.argmax(-1)).float().mean())
