"""From logits to tokens: penalties, temperature, top_k, top_p, min_p, and a draw that depends on the request alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from worker.engine.request import Request, TokenLogprob


@dataclass(frozen=True, slots=True)
class Sampled:
    """A chosen token, or None where the model's logits are not numbers."""

    token_id: int | None
    logprob: TokenLogprob | None


@dataclass(slots=True)
class Chosen:
    """Tokens chosen on the device, on their way to the host.

    A step may be launched from `tokens` before anybody has waited for them.
    """

    requests: list[Request]
    tokens: torch.Tensor  # [rows], on the device; of a damaged row, any
    rows: dict[int, int]  # id of a request → its row
    _known: torch.Tensor  # [rows] on the host once `_ready`; -1 for a damaged row
    _ready: torch.cuda.Event | None
    _raw: torch.Tensor

    def read(self) -> list[Sampled]:
        """Wait for the tokens."""
        if self._ready is not None:
            self._ready.synchronize()
        known: list[int] = self._known.tolist()
        logprobs = _logprobs(self._raw, self.tokens, known, self.requests)
        return [Sampled(None if t < 0 else t, p) for t, p in zip(known, logprobs, strict=True)]


def sample(logits: torch.Tensor, requests: list[Request]) -> list[Sampled]:
    """Choose one token a row. logits [rows, vocabulary], row i belongs to requests[i]; any float type."""
    return choose(logits, requests).read()


def choose(logits: torch.Tensor, requests: list[Request]) -> Chosen:
    """As `sample`, without waiting for the device: nothing here needs a value of it, and one copy takes the tokens away."""
    plain = all(r.params.greedy and not r.params.penalised and r.grammar is None for r in requests)
    if plain:  # the likeliest of any float type is the likeliest in float32
        raw = logits
        tokens = raw.argmax(dim=-1)
        broken = raw.gather(-1, tokens[:, None]).squeeze(-1).isnan()  # argmax finds a NaN if there is one
    else:
        raw = logits.float()
        broken = raw.amax(dim=-1).isnan()
        scores = _keep_to_grammar(_penalise(raw, requests), requests)
        tokens = scores.argmax(dim=-1)
        drawn = [i for i, r in enumerate(requests) if not r.params.greedy]
        if len(drawn) == len(requests):
            tokens = _draw(scores, requests)
        elif drawn:
            index = upload(drawn, torch.int64, logits.device)
            tokens[index] = _draw(scores[index], [requests[i] for i in drawn])
    known = torch.where(broken, -1, tokens)
    ready = None
    if known.is_cuda:
        host = torch.empty(known.shape, dtype=known.dtype, pin_memory=True)
        host.copy_(known, non_blocking=True)
        known, ready = host, torch.cuda.Event()
        ready.record()
    return Chosen(requests, tokens, {id(r): i for i, r in enumerate(requests)}, known, ready, raw)


def upload(values: list[Any], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor on the device; on a GPU through pinned memory, because a copy out of other memory waits for the device."""
    if device.type == "cuda":
        return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)
    return torch.tensor(values, dtype=dtype, device=device)


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
        return upload(values, torch.float32, device)[:, None]

    # Without the largest taken off first, a small temperature makes infinities, and their softmax is not a number.
    scores = (scores - scores.amax(dim=-1, keepdim=True)) / column([r.params.temperature for r in requests])
    vocab = scores.shape[-1]
    if any(0 < r.params.top_k < vocab for r in requests) or any(r.params.top_p < 1.0 for r in requests):
        ordered, _ = scores.sort(dim=-1, descending=True)
        limits = [r.params.top_k if 0 < r.params.top_k < vocab else vocab for r in requests]
        k = upload(limits, torch.int64, device)[:, None]
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
    points = upload([r.random.random() for r in requests], torch.float64, device)[:, None]
    return torch.searchsorted(totals, points * totals[:, -1:], right=True).squeeze(-1).clamp_(max=vocab - 1)


def _logprobs(
    raw: torch.Tensor, chosen: torch.Tensor, tokens: list[int], requests: list[Request]
) -> list[TokenLogprob | None]:
    found: list[TokenLogprob | None] = [None] * len(requests)
    rows = [i for i, r in enumerate(requests) if r.params.logprobs is not None]
    if not rows:
        return found
    index = torch.tensor(rows, device=raw.device)
    logs = raw[index].float().log_softmax(dim=-1)
    own = logs.gather(-1, chosen[index][:, None]).squeeze(-1).tolist()
    most = max(requests[i].params.logprobs or 0 for i in rows)
    values, ids = (t.tolist() for t in logs.topk(most, dim=-1)) if most else ([[]] * len(rows), [[]] * len(rows))
    for at, i in enumerate(rows):
        n = requests[i].params.logprobs or 0
        found[i] = TokenLogprob(tokens[i], own[at], tuple(zip(ids[at][:n], values[at][:n], strict=True)))
    return found
