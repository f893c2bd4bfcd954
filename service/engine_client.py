"""The API's way to the generation engine: `lorry engine`, or a vLLM server in its place.

Only vLLM's protocol is relied on (OpenAI's /v1/models and /v1/completions, /v1/chat/completions, the two calls for
adapters); what lorry's engine adds under "lorry" (timings, the base's template) is used where it is there.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from service.engine_transport import EngineTransport
from service.errors import Conflict, Invalid, LorryError, NotFound, Unavailable
from service.logs import REQUEST_ID_HEADER, request_id
from service.openai.wire import Piece, TokenInfo, Usage
from service.settings import Settings
from service.templates import StoredTemplate

BASE_TTL = 30.0  # seconds for which what the engine said of its base is believed
_TOO_LONG = re.compile(r"maximum (?:context|model) length|max_model_len", re.IGNORECASE)


@dataclass(frozen=True)
class BaseModel:
    """The engine's base. `template` and `load_in_4bit` are None with an engine that does not tell (vLLM)."""

    name: str
    root: str
    max_model_len: int | None
    template: StoredTemplate | None
    load_in_4bit: bool | None
    created: int


@dataclass(frozen=True)
class Target:
    """An adapter as the engine is to serve it: `path` is loaded under `name`."""

    name: str
    path: Path


@dataclass
class Timings:
    """Milliseconds since the API began with the request."""

    queue_ms: float = 0.0
    first_token_ms: float = 0.0
    total_ms: float = 0.0


class Generation:
    """The pieces of an answer as they come; `usage` and `timings` are right once the last one has come."""

    def __init__(self, response: httpx.Response, began: float, sent: float, url: str) -> None:
        self.url = url
        self.usage = Usage()
        self.timings = Timings(queue_ms=_ms(began))
        self._response = response
        self._began = began
        self._offset = (sent - began) * 1000  # what passed before the engine's own clock started
        self._offsets: dict[int, int] = {}

    async def __aiter__(self) -> AsyncIterator[Piece]:
        async for batch in self.batches():
            for piece in batch:
                yield piece

    async def batches(self) -> AsyncIterator[list[Piece]]:
        """The pieces, those together that have come together: one when there is time, more when there is much to do."""
        try:
            async for batch in self._batches():
                yield batch
        except httpx.HTTPError as error:
            raise _unreachable(self.url, error) from error

    async def _batches(self) -> AsyncIterator[list[Piece]]:
        told: Mapping[str, float] | None = None
        async for bodies in _events(self._response):
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
        self.timings.total_ms = _ms(self._began)
        if told:
            for name in ("queue_ms", "first_token_ms", "total_ms"):
                setattr(self.timings, name, round(told[name] + self._offset, 3))

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


class EngineClient:
    """One pool of connections to the engine. Every call raises Unavailable if the engine does not answer."""

    def __init__(self, settings: Settings) -> None:
        self.url = settings.engine_url.rstrip("/")
        self._http = httpx.AsyncClient(
            base_url=self.url,
            # No read limit: how long an answer takes is the engine's to say; a dead one closes its connections.
            timeout=httpx.Timeout(connect=5.0, read=None, write=30.0, pool=None),
            mounts={"http://": EngineTransport()},
            # For https. Idle connections are given up before the engine does it (5 s): none is reused while it closes.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=2.0),
            trust_env=False,
            event_hooks={"request": [_name_request]},
        )
        self._loaded: dict[str, Path] = {}  # what this client knows to be loaded; the engine is asked once a name
        self._locks: dict[str, asyncio.Lock] = {}
        self._base: tuple[float, BaseModel] | None = None

    async def aclose(self) -> None:
        await self._http.aclose()

    async def models(self) -> list[dict[str, Any]]:
        """The engine's model cards."""
        response = await self._send("GET", "/v1/models", timeout=10.0)
        return list(response.json()["data"])

    async def base(self, *, fresh: bool = False) -> BaseModel:
        """The base model the engine holds, asked for at most every BASE_TTL seconds unless `fresh`."""
        if self._base is not None and not fresh and time.monotonic() - self._base[0] < BASE_TTL:
            return self._base[1]
        cards = await self.models()
        card = next((c for c in cards if not c.get("parent")), None)
        if card is None:
            raise Unavailable("the engine names no base model")
        own = card.get("lorry") or {}
        template = own.get("template")
        base = BaseModel(
            name=card["id"],
            root=card.get("root") or card["id"],
            max_model_len=card.get("max_model_len"),
            template=StoredTemplate.model_validate(template) if template else None,
            load_in_4bit=own.get("load_in_4bit"),
            created=int(card.get("created") or 0),
        )
        self._base = (time.monotonic(), base)
        return base

    async def loaded(self) -> Collection[str]:
        """Names of the adapters the engine holds."""
        return [c["id"] for c in await self.models() if c.get("parent")]

    async def load(self, name: str, path: Path) -> None:
        """Load a folder under a name, in place of what had the name.

        Raises Conflict for an adapter of another base, Invalid for one that the engine cannot serve, NotFound for a
        folder that the engine cannot see.
        """
        body = {"lora_name": name, "lora_path": str(path.absolute())}
        async with self._locks.setdefault(name, asyncio.Lock()):
            self._loaded.pop(name, None)
            try:
                await self._send("POST", "/v1/load_lora_adapter", json=body)
            except LorryError as error:
                # vLLM does not replace a name.
                if "already been loaded" not in error.message:
                    raise
                await self._send("POST", "/v1/unload_lora_adapter", json={"lora_name": name})
                await self._send("POST", "/v1/load_lora_adapter", json=body)
            self._loaded[name] = path

    async def unload(self, name: str) -> None:
        """Unload a name; nothing happens if it is not loaded."""
        self._loaded.pop(name, None)
        try:
            await self._send("POST", "/v1/unload_lora_adapter", json={"lora_name": name})
        except NotFound:
            pass
        except LorryError as error:
            if "cannot be found" not in error.message:
                raise

    @asynccontextmanager
    async def generate(
        self, body: Mapping[str, Any], target: Target | None, *, chat: bool = False
    ) -> AsyncIterator[Generation]:
        """Start a completion (or chat completion) and hand out its pieces; leaving the block aborts it.

        `body` is the request without model and stream. With a target the adapter is loaded if the engine does not have
        it, and once more if the engine has forgotten it. Raises what the engine's answer means: Invalid
        (prompt_too_long, …), Unavailable (queue_full, …), Conflict (wrong_base), NotFound.
        """
        began = time.monotonic()
        response, sent = await self._open(dict(body), target, "/v1/chat/completions" if chat else "/v1/completions")
        try:
            yield Generation(response, began, sent, self.url)
        finally:
            await response.aclose()

    async def _open(self, body: dict[str, Any], target: Target | None, path: str) -> tuple[httpx.Response, float]:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        if target is None:
            body["model"] = (await self.base()).name
        else:
            body["model"] = target.name
            if self._loaded.get(target.name) != target.path:
                await self.load(target.name, target.path)
        sent = time.monotonic()
        try:
            return await self._stream(path, body), sent
        except NotFound:
            # The engine has been started again since, or has dropped the adapter for others.
            if target is None:
                body["model"] = (await self.base(fresh=True)).name
            else:
                await self.load(target.name, target.path)
            sent = time.monotonic()
            return await self._stream(path, body), sent

    async def _stream(self, path: str, body: dict[str, Any]) -> httpx.Response:
        request = self._http.build_request("POST", path, json=body)
        try:
            response = await self._http.send(request, stream=True)
            if response.is_success:
                return response
            try:
                await response.aread()
            finally:
                await response.aclose()
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        raise _error_from(response)

    async def _send(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        try:
            response = await self._http.request(method, path, **kwargs)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        if not response.is_success:
            raise _error_from(response)
        return response

    def _unreachable(self, error: httpx.HTTPError) -> Unavailable:
        self._base = None  # another engine may come up at this address
        return _unreachable(self.url, error)


async def _name_request(request: httpx.Request) -> None:
    """The engine logs what it does for a request of ours under the same id."""
    if current := request_id():
        request.headers[REQUEST_ID_HEADER] = current


def _unreachable(url: str, error: httpx.HTTPError) -> Unavailable:
    reason = "does not answer" if isinstance(error, httpx.ConnectError | httpx.TimeoutException) else "broke off"
    return Unavailable(f"the engine at {url} {reason} ({type(error).__name__})", code="engine_unavailable")


def _ms(began: float) -> float:
    return round((time.monotonic() - began) * 1000, 3)


def _numeric(body: Mapping[str, Any]) -> bool:
    return isinstance(body["error"], dict) and isinstance(body["error"].get("code"), int)


def _error_from(response: httpx.Response) -> LorryError:
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
    raise Unavailable("the engine broke off in the middle of an answer", code="engine_unavailable")


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
