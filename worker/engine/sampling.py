"""From logits to tokens: penalties, temperature, top_k, top_p, min_p, and a draw that depends on the request alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from worker.engine.request import Request, TokenLogprob


@dataclass(frozen=True, slots=True)
class Sampled:
    """A chosen token, or None where the model's logits are not numbers."""

    token_id: int | None
    logprob: TokenLogprob | None


def sample(logits: torch.Tensor, requests: list[Request]) -> list[Sampled]:
    """Choose one token a row. logits [rows, vocabulary], row i belongs to requests[i]; any float type."""
    raw = logits.float()
    broken = raw.amax(dim=-1).isnan().tolist()
    scores = _keep_to_grammar(_penalise(raw, requests), requests)
    chosen = scores.argmax(dim=-1)
    drawn = [i for i, r in enumerate(requests) if not r.params.greedy and not broken[i]]
    if drawn:
        index = torch.tensor(drawn, device=logits.device)
        chosen[index] = _draw(scores[index], [requests[i] for i in drawn])
    tokens: list[int] = chosen.tolist()
    logprobs = _logprobs(raw, chosen, tokens, requests)
    return [Sampled(None if broken[i] else token, logprobs[i]) for i, token in enumerate(tokens)]


def _keep_to_grammar(scores: torch.Tensor, requests: list[Request]) -> torch.Tensor:
    """Tokens that a request's grammar does not allow can be neither the likeliest nor drawn."""
    rows = [(i, r.grammar) for i, r in enumerate(requests) if r.grammar is not None]
    if not rows:
        return scores
    scores = scores.clone()
    for i, grammar in rows:
        allowed = grammar.allowed()
        if allowed is not None:  # a grammar that failed is told when its next token is taken in
            scores[i].masked_fill_(~allowed.to(scores.device), float("-inf"))
    return scores


def _penalise(raw: torch.Tensor, requests: list[Request]) -> torch.Tensor:
    """Repetition penalty over prompt and completion (Keskar et al. 2019), presence and frequency over the completion."""
    rows = [i for i, r in enumerate(requests) if r.params.penalised]
    if not rows:
        return raw
    scores = raw.clone()
    for i in rows:
        request, p, row = requests[i], requests[i].params, scores[i]
        if p.repetition_penalty != 1.0:
            seen = torch.tensor(sorted({*request.prompt_ids, *request.output_ids}), device=raw.device)
            values = row[seen]
            row[seen] = torch.where(values < 0, values * p.repetition_penalty, values / p.repetition_penalty)
        if (p.presence_penalty or p.frequency_penalty) and request.output_ids:
            ids, counts = torch.tensor(request.output_ids, device=raw.device).unique(return_counts=True)
            row[ids] -= p.presence_penalty + p.frequency_penalty * counts
    return scores


def _draw(scores: torch.Tensor, requests: list[Request]) -> torch.Tensor:
    """Sample rows. [rows, vocabulary] → [rows] token ids.

    The inverse of the distribution function, summed in the order of token ids: unlike an order by probability it does
    not jump when rounding makes two near-equal tokens change places, so a seed gives the same text in any batch.
    """
    device = scores.device

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)[:, None]

    # Without the largest taken off first, a small temperature makes infinities, and their softmax is not a number.
    scores = (scores - scores.amax(dim=-1, keepdim=True)) / column([r.params.temperature for r in requests])
    vocab = scores.shape[-1]
    if any(0 < r.params.top_k < vocab for r in requests) or any(r.params.top_p < 1.0 for r in requests):
        ordered, _ = scores.sort(dim=-1, descending=True)
        k = torch.tensor([r.params.top_k if 0 < r.params.top_k < vocab else vocab for r in requests], device=device)[
            :, None
        ]
        ordered = ordered.masked_fill(torch.arange(vocab, device=device)[None, :] >= k, float("-inf"))
        probs = ordered.softmax(dim=-1)
        # A token stays if those before it do not reach top_p yet: the first one always stays.
        before = probs.cumsum(dim=-1) - probs
        kept = (before < column([r.params.top_p for r in requests])) & ordered.isfinite()
        kept[:, 0] = True
        last = kept.sum(dim=-1, keepdim=True) - 1
        scores = scores.masked_fill(scores < ordered.gather(-1, last), float("-inf"))
    probs = scores.softmax(dim=-1)
    if any(r.params.min_p > 0.0 for r in requests):
        floor = probs.amax(dim=-1, keepdim=True) * column([r.params.min_p for r in requests])
        probs = probs.masked_fill(probs < floor, 0.0)
    totals = probs.double().cumsum(dim=-1)
    points = torch.tensor([r.random.random() for r in requests], dtype=torch.float64, device=device)[:, None]
    return torch.searchsorted(totals, points * totals[:, -1:], right=True).squeeze(-1).clamp_(max=vocab - 1)


def _logprobs(
    raw: torch.Tensor, chosen: torch.Tensor, tokens: list[int], requests: list[Request]
) -> list[TokenLogprob | None]:
    found: list[TokenLogprob | None] = [None] * len(requests)
    rows = [i for i, r in enumerate(requests) if r.params.logprobs is not None]
    if not rows:
        return found
    index = torch.tensor(rows, device=raw.device)
    logs = raw[index].log_softmax(dim=-1)
    own = logs.gather(-1, chosen[index][:, None]).squeeze(-1).tolist()
    most = max(requests[i].params.logprobs or 0 for i in rows)
    values, ids = (t.tolist() for t in logs.topk(most, dim=-1)) if most else ([[]] * len(rows), [[]] * len(rows))
    for at, i in enumerate(rows):
        n = requests[i].params.logprobs or 0
        found[i] = TokenLogprob(tokens[i], own[at], tuple(zip(ids[at][:n], values[at][:n], strict=True)))
    return found
