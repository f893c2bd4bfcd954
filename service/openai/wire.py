"""OpenAI's answers, built from pieces of text: the engine's from its deltas, the API's from the engine's answers."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class TokenInfo:
    """A generated token with its log-probability, and the likeliest at its place as (token, log-probability)."""

    token: str
    logprob: float
    top: list[tuple[str, float]] = field(default_factory=list)
    offset: int = 0


@dataclass(slots=True)
class Piece:
    """Part of one choice, or all of it. `tokens` is None where no log-probabilities were asked for."""

    index: int
    text: str = ""
    token_ids: list[int] | None = None
    tokens: list[TokenInfo] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    def extend(self, other: Piece) -> None:
        """Join a later piece of the same choice."""
        self.text += other.text
        if other.token_ids is not None:
            self.token_ids = (self.token_ids or []) + other.token_ids
        if other.tokens is not None:
            self.tokens = (self.tokens or []) + other.tokens
        self.finish_reason, self.stop_reason = other.finish_reason, other.stop_reason


@dataclass(slots=True)
class Usage:
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def body(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


_BYTES = re.compile(r"bytes:(\\x[0-9a-f]{2})+")


def token_bytes(token: str) -> list[int]:
    """UTF-8 bytes of a token's text, also of one written as `bytes:\\xe2\\x82` because it is part of a character."""
    if _BYTES.fullmatch(token):
        return list(bytes.fromhex(token.removeprefix("bytes:").replace("\\x", "")))
    return list(token.encode())


class CompletionWriter:
    """Bodies of /v1/completions."""

    def __init__(self, request_id: str, model: str, *, with_token_ids: bool = False) -> None:
        self.with_token_ids = with_token_ids
        self._head = {"id": request_id, "object": "text_completion", "created": int(time.time()), "model": model}

    def choice(self, piece: Piece) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": piece.index,
            "text": piece.text,
            "logprobs": None if piece.tokens is None else self._logprobs(piece.tokens),
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }
        if self.with_token_ids:
            choice["token_ids"] = piece.token_ids or []
        return choice

    @staticmethod
    def _logprobs(tokens: Sequence[TokenInfo]) -> dict[str, Any]:
        return {
            "tokens": [t.token for t in tokens],
            "token_logprobs": [t.logprob for t in tokens],
            # The chosen token is among them, as with OpenAI.
            "top_logprobs": [{**dict(t.top), t.token: t.logprob} for t in tokens],
            "text_offset": [t.offset for t in tokens],
        }

    def answer(self, pieces: Iterable[Piece], usage: Usage, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
        return {**self._head, "choices": [self.choice(p) for p in pieces], "usage": usage.body(), **(extra or {})}

    def first(self, indices: range) -> list[dict[str, Any]]:
        """Chunks before any text: none."""
        return []

    def chunk(self, piece: Piece, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
        return {**self._head, "choices": [self.choice(piece)], **(extra or {})}

    def usage(self, usage: Usage, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
        return {**self._head, "choices": [], "usage": usage.body(), **(extra or {})}


class ChatWriter:
    """Bodies of /v1/chat/completions."""

    def __init__(self, request_id: str, model: str, *, top_logprobs: int = 0, with_token_ids: bool = False) -> None:
        self.top_logprobs = top_logprobs
        self.with_token_ids = with_token_ids
        self._head = {"id": request_id, "created": int(time.time()), "model": model}

    def _logprobs(self, tokens: Sequence[TokenInfo] | None) -> dict[str, Any] | None:
        if tokens is None:
            return None
        return {
            "content": [
                {
                    **self._token(t.token, t.logprob),
                    "top_logprobs": [self._token(*top) for top in t.top[: self.top_logprobs]],
                }
                for t in tokens
            ],
            "refusal": None,
        }

    @staticmethod
    def _token(token: str, logprob: float) -> dict[str, Any]:
        return {"token": token, "logprob": logprob, "bytes": token_bytes(token)}

    def _ids(self, piece: Piece) -> dict[str, Any]:
        return {"token_ids": piece.token_ids or []} if self.with_token_ids else {}

    def answer(self, pieces: Iterable[Piece], usage: Usage, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
        choices = [
            {
                "index": p.index,
                "message": {"role": "assistant", "content": p.text, "refusal": None},
                "logprobs": self._logprobs(p.tokens),
                "finish_reason": p.finish_reason,
                "stop_reason": p.stop_reason,
                **self._ids(p),
            }
            for p in pieces
        ]
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": usage.body(), **(extra or {})}

    def first(self, indices: range) -> list[dict[str, Any]]:
        """Chunks before any text: each choice's role."""
        return [self._chunk(i, {"role": "assistant", "content": ""}) for i in indices]

    def chunk(self, piece: Piece, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
        body = self._chunk(piece.index, {"content": piece.text} if piece.text or not piece.finish_reason else {})
        choice = body["choices"][0]
        choice |= {
            "logprobs": self._logprobs(piece.tokens),
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }
        choice |= self._ids(piece)
        return {**body, **(extra or {})}

    def usage(self, usage: Usage, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage.body(), **(extra or {})}

    def _chunk(self, index: int, delta: dict[str, Any]) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}


Writer = CompletionWriter | ChatWriter
DONE = b"data: [DONE]\n\n"


# JSON leaves these as they are, but some clients take them for ends of a line.
_LINE_ENDS = str.maketrans({"\u0085": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"})


_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode  # made once: this runs for every token


def compact(body: Mapping[str, Any]) -> str:
    """JSON on one line, for an event's data."""
    text = _encode(body)
    return text if text.isascii() else text.translate(_LINE_ENDS)


def event(body: Mapping[str, Any]) -> bytes:
    """One server-sent event as OpenAI frames it."""
    return b"data: " + compact(body).encode() + b"\n\n"
