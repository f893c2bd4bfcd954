"""What the live adapter answers, kept row by row, and how an export's answers are compared with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from worker.verify_math import agreement, device_of, mean_kl, next_token_logprobs

PROMPT_TOKENS, ANSWER_TOKENS = 64, 16
EFFECT_ROWS = 4


@dataclass(frozen=True)
class Reference:
    """The live adapter (base + adapter, in float32 where memory allows) on the probe: up to 16 evaluation rows.

    Log-probabilities lie on disk, one file a row: with a vocabulary of 128k they are 1 GB together.
    """

    ids: list[list[int]]  # the probe rows
    answers: list[
        list[int]
    ]  # greedy continuations of prompt(i), at most ANSWER_TOKENS, ending with an end token if one came
    ends: list[int]  # token ids that end a generation
    loss: float  # mean cross-entropy over the probe's next tokens, in nats
    effect: (
        float  # mean KL (nats) from the adapter to its base without it, over the first rows: what an export must carry
    )
    folder: Path

    def prompt(self, i: int) -> list[int]:
        return prompt_of(self.ids[i])

    def logprobs(self, i: int) -> torch.Tensor:
        """[len(ids[i]), vocabulary] float32 log-probabilities, mapped from disk."""
        return torch.from_numpy(np.load(self.folder / f"{i}.npy", mmap_mode="c"))


@dataclass(frozen=True)
class Comparison:
    """An export's answers beside the adapter's."""

    rows: int
    positions: int
    mean_kl: float  # nats, mean over all positions
    argmax_agreement: float  # fraction of positions with the same likeliest token
    equal_tokens: int  # generated greedily, equal to the adapter's up to the first that differs
    total_tokens: int
    loss: float
    adapter_loss: float
    adapter_effect: float

    def report(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "positions": self.positions,
            "mean_kl": self.mean_kl,
            "argmax_agreement": self.argmax_agreement,
            "greedy_agreement": self.equal_tokens / max(1, self.total_tokens),
            "greedy_tokens": {"equal": self.equal_tokens, "total": self.total_tokens},
            "eval_loss": self.loss,
            "adapter_eval_loss": self.adapter_loss,
            "adapter_effect": self.adapter_effect,
        }


def prompt_of(ids: list[int]) -> list[int]:
    """The part of a probe row that a greedy continuation starts from: its first half, at most PROMPT_TOKENS."""
    return ids[: max(1, min(PROMPT_TOKENS, len(ids) // 2))]


def row_loss(logprobs: torch.Tensor, ids: list[int]) -> float:
    """Sum of the cross-entropies of a row's next tokens, in nats."""
    targets = torch.tensor(ids[1:])
    return -float(logprobs[:-1].gather(1, targets[:, None]).sum())


def equal_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens are the same before the first that differs."""
    n = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        n += 1
    return n


def continue_greedily(model: Any, prompts: list[list[int]], ends: list[int]) -> list[list[int]]:
    """Up to ANSWER_TOKENS likeliest tokens after each prompt, in one batch; an end token is the last of its answer."""
    longest = max(len(p) for p in prompts)
    device = device_of(model)
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    out: list[list[int]] = [[] for _ in prompts]
    done = [False] * len(prompts)
    past, positions = None, (mask.cumsum(-1) - 1).clamp(min=0)
    model.eval()
    with torch.no_grad():
        for _ in range(ANSWER_TOKENS):
            result = model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=past, use_cache=True,
                logits_to_keep=1,
            )  # fmt: skip
            past, ids = result.past_key_values, result.logits[:, -1].argmax(-1, keepdim=True)
            for i, token in enumerate(ids[:, 0].tolist()):
                if not done[i]:
                    out[i].append(token)
                    done[i] = token in ends
            if all(done):
                break
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
            positions = positions[:, -1:] + 1
    return out


def take(live: Any, ids: list[list[int]], ends: list[int], folder: Path, step: Callable[[int, int], None]) -> Reference:
    """Ask the live adapter (a PeftModel) about the probe. `step(done, total)` is called between rows and may raise."""
    folder.mkdir(parents=True, exist_ok=True)
    loss = effect = 0.0
    for i, row in enumerate(ids):
        step(i, len(ids))
        logprobs = next_token_logprobs(live, row)
        np.save(folder / f"{i}.npy", logprobs.numpy())
        loss += row_loss(logprobs, row)
        if i < EFFECT_ROWS:
            with live.disable_adapter():
                bare = next_token_logprobs(live, row)
            np.save(folder / f"base-{i}.npy", bare.numpy())
            effect += mean_kl(logprobs, bare) / min(EFFECT_ROWS, len(ids))
    step(len(ids), len(ids))
    answers = continue_greedily(live, [prompt_of(row) for row in ids], ends)
    return Reference(ids, answers, ends, loss / max(1, sum(len(r) - 1 for r in ids)), effect, folder)


def compare(model: Any, reference: Reference, step: Callable[[int, int], None]) -> Comparison:
    """Ask a model that was read back about the probe, row by row. `step(done, total)` comes between rows and may raise."""
    kl = same = loss = 0.0
    positions = sum(len(row) for row in reference.ids)
    for i, row in enumerate(reference.ids):
        step(i, len(reference.ids))
        got, expected = next_token_logprobs(model, row), reference.logprobs(i)
        kl += mean_kl(expected, got) * len(row)
        same += agreement(expected, got) * len(row)
        loss += row_loss(got, row)
    step(len(reference.ids), len(reference.ids))
    answers = continue_greedily(model, [reference.prompt(i) for i in range(len(reference.ids))], reference.ends)
    equal = sum(equal_prefix(a, b) for a, b in zip(reference.answers, answers, strict=True))
    return Comparison(
        rows=len(reference.ids),
        positions=positions,
        mean_kl=kl / positions,
        argmax_agreement=same / positions,
        equal_tokens=equal,
        total_tokens=sum(len(a) for a in reference.answers),
        loss=loss / max(1, positions - len(reference.ids)),
        adapter_loss=reference.loss,
        adapter_effect=reference.effect,
    )
