"""Choosing tokens: against transformers' own processors, and repeatable in any company."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch

from worker.engine.request import Request, SamplingParams
from worker.engine.sampling import sample

VOCAB = 50


def request(seed: int | None = 0, output: list[int] | None = None, **params: Any) -> Request:
    made = Request("r", [1, 2, 3], SamplingParams(max_tokens=10, seed=seed, **params))
    made.output_ids = output or []
    return made


def logits(rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


def draws(count: int, row: torch.Tensor, **params: Any) -> Counter[int]:
    found = sample(row.expand(count, -1), [request(seed=i, **params) for i in range(count)])
    return Counter(s.token_id for s in found if s.token_id is not None)


def test_temperature_zero_takes_the_likeliest() -> None:
    rows = logits(4)
    found = sample(rows, [request(temperature=0.0) for _ in range(4)])
    assert [s.token_id for s in found] == rows.argmax(-1).tolist()


@pytest.mark.parametrize(
    "params", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-4}, {"temperature": 1e-38}]
)
def test_the_narrowest_settings_are_greedy(params: dict[str, Any]) -> None:
    row = logits()
    assert set(draws(50, row, **params)) == {int(row.argmax())}


@pytest.mark.parametrize("params", [{}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_logits_of_any_size_can_be_divided_by_a_small_temperature(params: dict[str, Any]) -> None:
    row = logits() * 1e34
    assert set(draws(20, row, temperature=1.1e-5, **params)) == {int(row.argmax())}


def test_draws_follow_the_distribution() -> None:
    row = logits()
    found = draws(20_000, row, temperature=0.7)
    for token, p in enumerate((row[0] / 0.7).softmax(-1).tolist()):
        assert abs(found[token] / 20_000 - p) < 4 * math.sqrt(p * (1 - p) / 20_000) + 1e-4


@pytest.mark.parametrize(
    ("params", "warper"),
    [
        ({"top_k": 5}, "TopKLogitsWarper(5)"),
        ({"top_p": 0.6}, "TopPLogitsWarper(0.6)"),
        ({"min_p": 0.2}, "MinPLogitsWarper(0.2)"),
    ],
)
def test_what_can_be_drawn_is_what_transformers_keeps(params: dict[str, Any], warper: str) -> None:
    import transformers

    row = logits(seed=3)
    name, _, value = warper.rstrip(")").partition("(")
    processor = getattr(transformers, name)(int(value) if value.isdecimal() else float(value))
    kept = set(processor(None, row.clone())[0].isfinite().nonzero().flatten().tolist())
    assert 1 < len(kept) < VOCAB
    assert set(draws(5000, row, **params)) == kept


def test_the_repetition_penalty_is_transformers_own() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    made = request(temperature=0.0, repetition_penalty=1.7, output=[4, 4, 9])
    row = torch.zeros(1, VOCAB)
    row[0, 4], row[0, 9], row[0, 20] = 3.0, 2.9, 1.8
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([[1, 2, 3, 4, 4, 9]]), row.clone()).argmax(-1)
    assert sample(row, [made])[0].token_id == expected.item() == 20


def test_presence_and_frequency_penalties_count_the_completion_only() -> None:
    row = torch.zeros(1, VOCAB)
    row[0, 1], row[0, 4], row[0, 9] = 1.0, 2.0, 1.5
    seen = [4, 4]

    def greedy(**params: float) -> int | None:
        return sample(row, [request(temperature=0.0, output=seen, **params)])[0].token_id

    assert greedy() == 4
    assert greedy(presence_penalty=0.4) == 4
    assert greedy(frequency_penalty=0.4) == 9  # 2 - 2 × 0.4 < 1.5
    assert greedy(presence_penalty=2.0, frequency_penalty=2.0) == 9


def test_a_seed_draws_the_same_whatever_else_is_in_the_batch() -> None:
    row = logits(seed=5)
    alone = [sample(row, [request(seed=7)])[0].token_id for _ in range(3)]
    others = logits(6, seed=6)
    batch = torch.cat([others[:3], row, others[3:]])
    company = [request(seed=i, top_k=3) for i in range(3)] + [request(seed=7)] + [request(temperature=0.0)] * 3
    assert sample(batch, company)[3].token_id == alone[0]
    assert len(set(alone)) == 1


def test_a_request_draws_anew_for_each_token() -> None:
    made, row = request(seed=1), logits(seed=8)
    assert len({sample(row, [made])[0].token_id for _ in range(20)}) > 1


def test_logprobs_are_the_models_own_before_temperature_and_penalties() -> None:
    row = logits(seed=2)
    made = request(temperature=0.3, repetition_penalty=1.5, logprobs=3)
    (found,) = sample(row, [made])
    expected = row[0].log_softmax(-1)
    assert found.logprob is not None
    assert found.logprob.token_id == found.token_id
    assert found.logprob.logprob == pytest.approx(expected[found.token_id].item(), abs=1e-5)
    values, ids = expected.topk(3)
    assert [i for i, _ in found.logprob.top] == ids.tolist()
    assert [v for _, v in found.logprob.top] == pytest.approx(values.tolist(), abs=1e-5)


def test_rows_may_ask_for_different_logprobs() -> None:
    found = sample(logits(3), [request(), request(logprobs=0), request(logprobs=2)])
    assert found[0].logprob is None
    assert [len(f.logprob.top) for f in found[1:] if f.logprob] == [0, 2]


def test_logits_that_are_not_numbers_are_told_and_touch_no_other_row() -> None:
    rows = logits(2)
    rows[0, 3] = float("nan")
    found = sample(rows, [request(), request(temperature=0.0)])
    assert found[0].token_id is None
    assert found[1].token_id == int(rows[1].argmax())
