"""The API's way to one generation engine: `lorry engine`, or a vLLM server in its place. Several: service.engines.

Only vLLM's protocol is relied on (OpenAI's /v1/models and /v1/completions, /v1/chat/completions, the two calls for
adapters); what lorry's engine adds under "lorry" (timings, the base's template) is used where it is there.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from service.bases import base_key
from service.engine_answer import Answer, EngineAway, error_from, unreachable
from service.engine_transport import EngineTransport
from service.errors import Conflict, LorryError, NotFound, Unavailable
from service.logs import REQUEST_ID_HEADER, request_id
from service.storage import Storage
from service.templates import StoredTemplate

NOT_FOR_VLLM = "vLLM loads no adapter with its own embed_tokens and lm_head; export it as merged_16bit"
BASE_TTL = 30.0  # seconds for which what an engine said of its base is believed


@dataclass(frozen=True)
class BaseModel:
    """An engine's base. `template` and `load_in_4bit` are None with an engine that does not tell (vLLM)."""

    name: str
    root: str
    max_model_len: int | None
    template: StoredTemplate | None
    load_in_4bit: bool | None
    created: int
    keys: frozenset[str]  # base_key of every name it goes by


@dataclass(frozen=True)
class View:
    """What an engine said of itself, and when on time.monotonic's clock."""

    at: float
    base: BaseModel
    adapters: frozenset[str]


@dataclass(frozen=True)
class Target:
    """What is to answer: an adapter, whose `path` is loaded under `name`, or with no path the base of that name.

    `base` is the name of the base that the adapter was trained on, or the base's own. A pinned adapter stays in memory
    when others need its place. One with `own_embeddings` is not for vLLM.
    """

    name: str
    path: Path | None
    base: str
    pinned: bool = False
    own_embeddings: bool = False


@dataclass(frozen=True)
class _Loaded:
    path: Path
    pinned: bool | None  # None: the engine knows no pins
    at: float


class EngineClient:
    """One pool of connections to one engine. Every call raises Unavailable if the engine does not answer."""

    def __init__(self, url: str, storage: Storage) -> None:
        self._storage = storage
        self.url = url.rstrip("/")
        self.name = name_of(url)
        self.view: View | None = None  # the last one; it stays while the engine is away
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
        self._stale = False  # whether another engine may have come up at this address
        self._looking: asyncio.Task[View] | None = None
        self._loaded: dict[str, _Loaded] = {}  # what this client knows to be loaded
        self._locks: dict[str, asyncio.Lock] = {}
        self._waits: set[asyncio.Timeout] = set()  # for answers that have not begun
        self._answers: set[Answer] = set()

    async def aclose(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
        await self._http.aclose()

    # What the engine holds

    async def healthy(self, timeout: float) -> bool:
        """Whether the engine takes requests: it answers, and is not asleep.

        Raises Unavailable if it does not answer within `timeout` seconds, or says that it cannot work.
        """
        try:
            return not is_asleep(await self._send("GET", "/health", timeout=timeout))
        except NotFound:  # a server without this call; it answers
            return True

    async def models(self) -> list[dict[str, Any]]:
        """The engine's model cards."""
        response = await self._send("GET", "/v1/models", timeout=10.0)
        try:
            return [dict(card) for card in response.json()["data"]]
        except (ValueError, KeyError, TypeError) as error:
            raise Unavailable(f"what {self.name} answers is no list of models", code="engine_failed") from error

    async def look(self) -> View:
        """Ask the engine what it holds. Who asks at the same time shares the answer."""
        return await asyncio.shield(self.refresh())

    def refresh(self) -> asyncio.Task[View]:
        """Begin to ask the engine what it holds, for others to know soon."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look())
            self._looking.add_done_callback(lambda task: task.cancelled() or task.exception())  # seen, if nobody waits
        return self._looking

    async def _look(self) -> View:
        began = time.monotonic()
        cards = await self.models()
        try:
            base = _base_of([c for c in cards if not c.get("parent")])
            adapters = frozenset(str(c["id"]) for c in cards if c.get("parent"))
        except (ValueError, KeyError, TypeError) as error:
            raise Unavailable(f"{self.name} names no base model that can be read", code="engine_failed") from error
        # Dropped for others, or forgotten in a restart: to be loaded again, here or elsewhere.
        self._loaded = {n: known for n, known in self._loaded.items() if n in adapters or known.at > began}
        self._stale = False
        self.view = View(time.monotonic(), base, adapters)
        return self.view

    def old(self, seconds: float = BASE_TTL) -> bool:
        """Whether what is known of the engine is older than this, or may be another engine's."""
        return self.view is None or self._stale or time.monotonic() - self.view.at >= seconds

    def doubt(self) -> None:
        """What is known of the engine may no longer be so."""
        self._stale = True

    async def base(self) -> BaseModel:
        """The base model the engine holds, asked for at most every BASE_TTL seconds."""
        if self.view is None or self.old():
            return (await self.look()).base
        return self.view.base

    async def loaded(self) -> Collection[str]:
        """Names of the adapters the engine holds now."""
        return [c["id"] for c in await self.models() if c.get("parent")]

    def holds(self, target: Target) -> bool:
        """Whether the engine has this adapter in memory, or is about to, as far as this client knows."""
        known = self._loaded.get(target.name)
        if known is not None:
            return known.path == target.path
        lock = self._locks.get(target.name)
        return (lock is not None and lock.locked()) or (self.view is not None and target.name in self.view.adapters)

    def adapters(self) -> int:
        """How many adapters the engine holds, as far as this client knows."""
        return len(self._loaded.keys() | (self.view.adapters if self.view else frozenset()))

    async def load(self, target: Target) -> None:
        """Load an adapter's folder under its name, in place of what had the name.

        Raises Conflict for an adapter of another base, where only pinned ones are in its way, and for one that vLLM cannot
        serve, Invalid for one that the engine refuses, NotFound for a folder that it cannot see.
        """
        async with self._lock(target.name):
            await self._load(target)

    async def repin(self, target: Target) -> None:
        """Tell the engine whether an adapter is pinned, if it holds it."""
        if await self._is_lorry() and target.name in await self.loaded():
            await self._ensure(target, None)

    async def _ensure(self, target: Target, since: float | None) -> None:
        """Load it unless it is known to be loaded, after `since` if that is given."""
        if since is None and self._is_loaded(target):
            return
        async with self._lock(target.name):  # another request may have done it meanwhile
            if not self._is_loaded(target) or (since is not None and self._loaded[target.name].at < since):
                await self._load(target)

    def _is_loaded(self, target: Target) -> bool:
        known = self._loaded.get(target.name)
        return known is not None and known.path == target.path and known.pinned in (target.pinned, None)

    async def _is_lorry(self) -> bool:
        return (await self.base()).load_in_4bit is not None

    def _lock(self, name: str) -> asyncio.Lock:
        return self._locks.setdefault(name, asyncio.Lock())

    async def _load(self, target: Target) -> None:
        name, path = target.name, target.path
        assert path is not None
        body: dict[str, Any] = {"lora_name": name, "lora_path": await self._address(path)}
        if await self._is_lorry():
            body["pinned"] = target.pinned
        elif target.own_embeddings:
            raise Conflict(f"adapter {name}: {NOT_FOR_VLLM}", code="not_servable")
        self._loaded.pop(name, None)
        try:
            await self._send("POST", "/v1/load_lora_adapter", json=body)
        except LorryError as error:
            # vLLM does not replace a name.
            if "already been loaded" not in error.message:
                raise
            await self._send("POST", "/v1/unload_lora_adapter", json={"lora_name": name})
            await self._send("POST", "/v1/load_lora_adapter", json=body)
        self._loaded[name] = _Loaded(path, body.get("pinned"), time.monotonic())

    async def _address(self, path: Path) -> str:
        """By what the engine finds a folder of the data root. Raises NotFound and StorageUnavailable."""
        if self._storage.remote and (await self.base()).template is None:
            # vLLM, which reads folders: it has to see this host's cache.
            try:
                return str(await asyncio.to_thread(self._storage.fetch, path))
            except FileNotFoundError as error:
                raise NotFound(f"no adapter found: {error}", code="adapter_not_found") from error
        return self._storage.address(path)

    async def unload(self, name: str) -> None:
        """Unload a name; nothing happens if it is not loaded."""
        self._gone(lambda ref: ref == name)
        try:
            await self._send("POST", "/v1/unload_lora_adapter", json={"lora_name": name})
        except NotFound:
            pass
        except LorryError as error:
            if "cannot be found" not in error.message:
                raise

    def drop(self, name: str) -> None:
        """Believe no longer that an adapter or its checkpoints are loaded."""
        self._gone(lambda ref: is_of(ref, name))

    def _gone(self, test: Callable[[str], bool]) -> None:
        self._loaded = {ref: known for ref, known in self._loaded.items() if not test(ref)}
        if self.view is not None:
            left = frozenset(ref for ref in self.view.adapters if not test(ref))
            self.view = replace(self.view, adapters=left)

    # Answers

    async def open(self, body: Mapping[str, Any], target: Target, *, chat: bool, began: float) -> Answer:
        """Start a completion (or chat completion); closing the answer aborts it. `began`: when the request came.

        `body` is the request without model and stream. An adapter is loaded if the engine does not have it, and once
        more if the engine has forgotten it. Raises what the engine's answer means: Invalid (prompt_too_long, …),
        Unavailable (queue_full, …), Conflict (wrong_base), NotFound.
        """
        path = "/v1/chat/completions" if chat else "/v1/completions"
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        body["model"] = await self._model(target)
        sent = time.monotonic()
        try:
            response = await self._stream(path, body)
        except NotFound:
            # The engine has been started again since, or has dropped the adapter for others.
            body["model"] = await self._model(target, since=sent)
            sent = time.monotonic()
            response = await self._stream(path, body)
        answer = Answer(response, began, sent, self.name)
        self._answers.add(answer)
        return answer

    async def close(self, answer: Answer) -> None:
        self._answers.discard(answer)
        await answer.aclose()

    def hand_over(self) -> None:
        """End every answer that another engine can begin anew."""
        for answer in self._answers:
            if answer.movable():
                answer.hand_over()

    def cut_off(self, before: float) -> None:
        """End every answer of which nothing has been heard since `before`, as if the engine had broken off."""
        now = asyncio.get_running_loop().time()
        for wait in self._waits:
            wait.reschedule(now)
        for answer in self._answers:
            if answer.heard < before:
                answer.cut()

    async def _model(self, target: Target, since: float | None = None) -> str:
        """What the engine calls it, made ready. `since`: when the engine was asked and did not know it."""
        if target.path is not None:
            await self._ensure(target, since)
            return target.name
        view = self.view
        if view is None or self._stale or since is not None:
            view = await self.look()
        base = view.base
        if base_key(target.base) not in base.keys:
            raise Conflict(f"the engine at {self.name} holds {base.name} now, not {target.base}", code="wrong_base")
        return base.name

    async def _stream(self, path: str, body: Mapping[str, Any]) -> httpx.Response:
        request = self._http.build_request("POST", path, json=body)
        try:
            response = await self._answered(self._http.send(request, stream=True))
            if response.is_success:
                return response
            try:
                await response.aread()
            finally:
                await response.aclose()
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        raise error_from(response)

    async def _send(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        try:
            response = await self._answered(self._http.request(method, path, **kwargs))
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        if not response.is_success:
            raise error_from(response)
        return response

    async def _answered(self, response: Awaitable[httpx.Response]) -> httpx.Response:
        try:
            async with asyncio.timeout(None) as wait:
                self._waits.add(wait)
                try:
                    return await response
                finally:
                    self._waits.discard(wait)
        except TimeoutError as error:  # cut_off
            raise httpx.ReadTimeout("the engine says nothing") from error

    def _unreachable(self, error: httpx.HTTPError) -> EngineAway:
        self._stale = True  # another engine may come up at this address
        return unreachable(self.name, error)


def _base_of(cards: list[dict[str, Any]]) -> BaseModel:
    """The first base, under all names that the cards give. Raises ValueError if there is none."""
    if not cards:
        raise ValueError("no base model")
    card = cards[0]
    own = card.get("lorry") or {}
    template = own.get("template")
    names = [str(c[key]) for c in cards for key in ("id", "root") if c.get(key)]
    return BaseModel(
        name=card["id"],
        root=card.get("root") or card["id"],
        max_model_len=card.get("max_model_len"),
        template=StoredTemplate.model_validate(template) if template else None,
        load_in_4bit=own.get("load_in_4bit"),
        created=int(card.get("created") or 0),
        keys=frozenset(map(base_key, names)),
    )


def is_asleep(health: httpx.Response) -> bool:
    """Whether an engine's answer to GET /health says that a job has its memory (lorry's; vLLM's says nothing)."""
    try:
        body = health.json()
    except ValueError:
        return False
    return isinstance(body, dict) and body.get("status") == "asleep"


def name_of(url: str) -> str:
    """An engine's name in messages and metrics: its host and port, without a password."""
    parsed = httpx.URL(url)
    return parsed.netloc.decode() + parsed.path.rstrip("/")


def is_of(ref: str, name: str) -> bool:
    """Whether a reference stands for the adapter of that name or one of its checkpoints."""
    return ref == name or ref.startswith(f"{name}@")


async def _name_request(request: httpx.Request) -> None:
    """The engine logs what it does for a request of ours under the same id."""
    if current := request_id():
        request.headers[REQUEST_ID_HEADER] = current
