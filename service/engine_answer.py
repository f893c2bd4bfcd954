"""An engine's answer as it comes: pieces of text, and errors in our own tree."""

from __future__ import annotations

import json
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from service.errors import Conflict, Invalid, LorryError, NotFound, Unavailable
from service.openai.wire import Piece, TokenInfo, Usage

_TOO_LONG = re.compile(r"maximum (?:context|model) length|max_model_len", re.IGNORECASE)


class EngineAway(Unavailable):
    """The engine does not answer, or broke off.

    `begun`: it may have begun with the request. `silent`: nothing came in time.
    """

    code = "engine_unavailable"

    def __init__(self, message: str, *, begun: bool, silent: bool = False) -> None:
        super().__init__(message)
        self.begun = begun
        self.silent = silent


@dataclass
class Timings:
    """Milliseconds since the API began with the request."""

    queue_ms: float = 0.0
    first_token_ms: float = 0.0
    total_ms: float = 0.0


class Answer:
    """The pieces of one engine's answer as they come; `usage` and `timings` are right once the last one has come."""

    def __init__(self, response: httpx.Response, began: float, sent: float, name: str) -> None:
        self.usage = Usage()
        self.timings = Timings(queue_ms=_ms(began))
        self.heard = sent  # when something last came, on time.monotonic's clock
        self.movable: Callable[[], bool] = lambda: False  # whether another engine could give it from the beginning
        self._handed_over = False
        self._name = name  # of the engine
        self._response = response
        self._began = began
        self._offset = (sent - began) * 1000  # what passed before the engine's own clock started
        self._offsets: dict[int, int] = {}

    async def batches(self) -> AsyncIterator[list[Piece]]:
        """The pieces, those together that have come together: one when there is time, more when there is much to do.

        Raises EngineAway if the engine breaks off, Unavailable (engine_asleep) after `hand_over`, else what its error event
        means.
        """
        told: Mapping[str, float] | None = None
        try:
            async for bodies in _events(self._response):
                self.heard = time.monotonic()
                batch: list[Piece] = []
                for body in bodies:
                    if "error" in body:
                        if batch:
                            yield batch
                        raise _error_of(body, int(body["error"].get("code") or 500) if _numeric(body) else 500)
                    if body.get("usage"):
                        self.usage = Usage(body["usage"]["prompt_tokens"], body["usage"].get("completion_tokens") or 0)
                    told = told or body.get("lorry") or None
                    for choice in body.get("choices") or ():
                        piece = self._piece(choice)
                        if not self.timings.first_token_ms and (piece.text or piece.token_ids or piece.finish_reason):
                            self.timings.first_token_ms = _ms(self._began)
                        if piece.text or piece.token_ids or piece.tokens or piece.finish_reason:
                            batch.append(piece)
                if batch:
                    yield batch
        except httpx.HTTPError as error:
            if self._handed_over:
                raise Unavailable(f"the engine at {self._name} is asleep", code="engine_asleep") from error
            raise unreachable(self._name, error) from error
        self.timings.total_ms = _ms(self._began)
        if told:
            for name in ("queue_ms", "first_token_ms", "total_ms"):
                setattr(self.timings, name, round(told[name] + self._offset, 3))

    def hand_over(self) -> None:
        """End it, for another engine to begin it anew."""
        self._handed_over = True
        self.cut()

    def cut(self) -> None:
        """End it as if the engine had broken off."""
        abort = self._response.extensions.get("abort")  # EngineTransport's
        if abort is not None:
            abort()

    async def aclose(self) -> None:
        await self._response.aclose()

    def _piece(self, choice: Mapping[str, Any]) -> Piece:
        text = choice["text"] if "text" in choice else (choice.get("delta") or {}).get("content") or ""
        index = int(choice["index"])
        start = self._offsets.get(index, 0)
        self._offsets[index] = start + len(text)
        return Piece(
            index,
            text,
            choice.get("token_ids"),
            _tokens(choice.get("logprobs"), start),
            choice.get("finish_reason"),
            choice.get("stop_reason"),
        )


def unreachable(name: str, error: httpx.HTTPError) -> EngineAway:
    refused = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
    silent = isinstance(error, httpx.TimeoutException)
    reason = "does not answer" if refused or silent else "broke off"
    return EngineAway(f"the engine at {name} {reason} ({type(error).__name__})", begun=not refused, silent=silent)


def _ms(began: float) -> float:
    return round((time.monotonic() - began) * 1000, 3)


def _numeric(body: Mapping[str, Any]) -> bool:
    return isinstance(body["error"], dict) and isinstance(body["error"].get("code"), int)


def error_from(response: httpx.Response) -> LorryError:
    try:
        body = response.json()
    except ValueError:
        body = {}
    if not isinstance(body, dict):
        body = {}
    if "error" not in body:  # older vLLM puts the members at the top
        body = {
            "error": body if "message" in body else {"message": response.text[:500] or f"status {response.status_code}"}
        }
    retry = response.headers.get("retry-after", "")
    return _error_of(body, response.status_code, int(retry) if retry.isdecimal() else 5)


def _error_of(body: Mapping[str, Any], status: int, retry_after: int = 5) -> LorryError:
    """The engine's error in our tree."""
    detail: Mapping[str, Any] = body["error"] if isinstance(body["error"], dict) else {"message": str(body["error"])}
    message, param = str(detail.get("message") or "the engine gave no reason"), detail.get("param")
    code = detail.get("code") if isinstance(detail.get("code"), str) else None
    if status == 404:
        return NotFound(message, param=param, code=code or "model_not_found")
    if status == 409:
        return Conflict(message, param=param, code=code)
    if status in (400, 413, 422):
        lengths = {k: v for k, v in detail.items() if k in ("prompt_tokens", "max_tokens")}
        if code is None and _TOO_LONG.search(message):
            code, param = "prompt_too_long", "prompt"
            lengths = _lengths(message)
        return Invalid(message, param=param, code=code, extra=lengths)
    if status in (429, 503) or code == "shutting_down":
        return Unavailable(message, retry_after=retry_after, code=code)
    return Unavailable(f"the engine failed: {message}", retry_after=retry_after, code=code or "engine_failed")


def _lengths(message: str) -> dict[str, int]:
    """Both lengths out of vLLM's sentence, if it names them."""
    limit = re.search(r"length (?:is|of)(?: the model)?:?\s*\(?(\d+)|max_model_len\D+(\d+)", message)
    asked = re.search(r"requested (\d+)|\(length (\d+)\)|(?:contains|has)(?: at least)? (\d+)", message)
    found = {"prompt_tokens": asked, "max_tokens": limit}
    return {k: int(next(g for g in m.groups() if g)) for k, m in found.items() if m}


async def _events(response: httpx.Response) -> AsyncIterator[list[dict[str, Any]]]:
    """The JSON bodies of an OpenAI event stream, those together that have come together.

    Split by bytes: str.splitlines also splits inside JSON strings.
    """
    rest = b""
    async for data in response.aiter_bytes():
        *lines, rest = (rest + data).split(b"\n")
        bodies: list[dict[str, Any]] = []
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            payload = line[5:].strip()
            if payload == b"[DONE]":
                yield bodies
                return
            bodies.append(json.loads(payload.decode()))  # given bytes, it would look for their encoding each time
        if bodies:
            yield bodies
    raise EngineAway("the engine broke off in the middle of an answer", begun=True)


def _tokens(logprobs: Mapping[str, Any] | None, offset: int) -> list[TokenInfo] | None:
    """Log-probabilities of completions and of chat completions in one form, the likeliest first."""
    if logprobs is None:
        return None
    if "content" in logprobs:
        found = []
        for t in logprobs["content"] or ():
            top = [(x["token"], x["logprob"]) for x in t.get("top_logprobs") or ()]
            found.append(TokenInfo(t["token"], t["logprob"], top, offset))
            offset += len(t["token"])
        return found
    tops = logprobs.get("top_logprobs") or [None] * len(logprobs["tokens"])
    return [
        TokenInfo(token, value, sorted((top or {}).items(), key=lambda item: -item[1]), place)
        for token, value, top, place in zip(
            logprobs["tokens"], logprobs["token_logprobs"], tops, logprobs["text_offset"], strict=True
        )
    ]
