"""One generation as the engine sees it: what was asked, how far it is, what has come out. No torch here."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from typing import Any, Literal

from service.errors import LorryError

GREEDY_BELOW = 1e-5  # as in vLLM: no draw at such a temperature differs from the likeliest token
FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen. A temperature below 1e-5 is greedy.

    0 for top_k, 1 for top_p and 0 for min_p switch them off.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logprobs: int | None = None  # None: none; n: the chosen token's and those of the n likeliest
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    include_stop_str_in_output: bool = False

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def penalised(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A chosen token's natural-log probability under the model itself (before temperature and penalties), and the likeliest."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class Delta:
    """What one or several steps added to a request. The last delta of a request has a finish reason.

    `offset` is the length of the decoded text, in characters, before each token (for OpenAI's text_offset).
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: LorryError | None = None
    timings: dict[str, float] | None = None

    def extend(self, other: Delta) -> None:
        """Join a later delta of the same request to this one."""
        self.text += other.text
        self.token_ids += other.token_ids
        self.logprobs += other.logprobs
        self.offsets += other.offsets
        self.finish_reason, self.stop_reason = other.finish_reason, other.stop_reason
        self.error, self.timings = other.error, other.timings


class Request:
    """A prompt and its growing completion.

    `computed` counts the leading tokens whose keys and values are in the cache, in the blocks of `blocks`; the scheduler
    alone changes these two. `adapter` is opaque to the scheduler, which only knows `key`, the name under which
    requests share their turn.
    """

    def __init__(
        self,
        request_id: str,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        key: str = "",
        adapter: Any = None,
        grammar: Any = None,
    ) -> None:
        if not prompt_ids:
            raise ValueError("a prompt has at least one token")
        self.id = request_id
        self.prompt_ids = prompt_ids
        self.params = params
        self.key = key
        self.adapter = adapter
        self.grammar = grammar  # a worker.engine.grammar.Grammar: the tokens that may come next
        self.output_ids: list[int] = []
        self.pending = 0  # tokens chosen on the device that are not in `output_ids` yet
        self.blocks: list[int] = []
        self.computed = 0
        # One uniform number a token from a generator of its own: a seed repeats whatever else is in the batch.
        self.random = random.Random(params.seed)
        self.submitted_at = time.monotonic()
        self.scheduled_at: float | None = None
        self.first_token_at: float | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids) + self.pending

    @property
    def runs_ahead(self) -> bool:
        """Whether its next token can be chosen before the host knows the one before."""
        return self.grammar is None and not self.params.penalised and self.params.logprobs is None

    def tokens(self, start: int, stop: int) -> list[int]:
        """Token ids start…stop-1 of prompt and completion together."""
        n = len(self.prompt_ids)
        if start >= n:
            return self.output_ids[start - n : stop - n]
        return self.prompt_ids[start:stop] + self.output_ids[: max(0, stop - n)]

    def timings(self, now: float) -> dict[str, float]:
        """queue_ms, first_token_ms and total_ms, each counted from the moment the request came in."""

        def ms(at: float | None) -> float:
            return round(((now if at is None else at) - self.submitted_at) * 1000, 3)

        return {"queue_ms": ms(self.scheduled_at), "first_token_ms": ms(self.first_token_at), "total_ms": ms(now)}
