"""All engines as one: which of them answers a request, and what happens when one dies.

A request goes to an engine that holds its base: one that is awake before those whose memory a job has, then one that has
its adapter in memory, then the one with the fewest open requests of this API. If that engine does not answer, breaks off, is
full or asleep, another one gets the request, as long as nothing of the answer has been given out: a generation has no other
effect.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from service.bases import base_key
from service.engine_answer import Answer, EngineAway, Timings
from service.engine_client import BaseModel, Target, is_of
from service.engine_watch import Engine
from service.errors import Conflict, LorryError, Unavailable
from service.openai.wire import Piece, Usage
from service.settings import Settings
from service.storage import open_storage

T = TypeVar("T")
RESIDENT_TTL = 5.0  # seconds for which an engine's list of adapters is believed when one is looked for
PATIENCE = 2.0  # seconds that a request waits for such lists
MOST_BREAKS = 2  # engines that may break off under one request: it may be the request that breaks them


class Engines:
    """The engines of LORRY_ENGINE_URL. Every call raises Unavailable if none that could do it answers.

    A lone engine is asked whatever is known of it: it says itself what it cannot serve.
    """

    def __init__(self, settings: Settings, registry: CollectorRegistry) -> None:
        urls = settings.engine_urls
        storage = open_storage(settings)
        self.engines = [Engine(url, storage, alone=len(urls) == 1) for url in urls]
        self._usual = base_key(settings.base_model)
        self._registry = registry
        self._collector = _EnginesCollector(self.engines)
        registry.register(self._collector)
        self._watches: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to watch them; a running loop is needed."""
        self._watches = [asyncio.create_task(engine.watch()) for engine in self.engines]

    async def aclose(self) -> None:
        for watch in self._watches:
            watch.cancel()
        await asyncio.gather(*self._watches, return_exceptions=True)
        await asyncio.gather(*(engine.aclose() for engine in self.engines))
        self._registry.unregister(self._collector)

    # Bases

    async def bases(self) -> list[BaseModel]:
        """The bases of all engines, each name once; one that is away counts with what it held."""
        await self._know()
        found: dict[str, BaseModel] = {}
        for _, base in self._known():
            found.setdefault(base.name, base)
        return list(found.values())

    async def base(self, name: str | None = None) -> BaseModel | None:
        """The base of this name; None if no engine holds it.

        Without a name the first that is LORRY_BASE_MODEL, else that of the first engine that answers.
        """
        bases = await self.bases()
        if name is None:
            here = [base for engine, base in self._known() if engine.away is None]
            asked = next((base for base in bases if self._usual in base.keys), (here or bases)[0])
        else:
            named = next((base for base in bases if base.name == name), None)
            if named is None:
                if unknown := [engine for engine in self.engines if engine.view is None]:
                    raise _away(f"whether {name} is served is not known", unknown)
                return None
            asked = named
        # Engines of one base may be of different make: one that tells its template, if there is any.
        same = [base for base in bases if base.keys & {base_key(asked.name)}]
        return next((base for base in [asked, *same] if base.template is not None), asked)

    def _known(self) -> Iterator[tuple[Engine, BaseModel]]:
        return ((engine, engine.view.base) for engine in self.engines if engine.view is not None)

    async def _know(self) -> None:
        """Have something known of every engine that answers. Raises Unavailable if nothing is known of any."""
        if len(self.engines) == 1:
            (engine,) = self.engines
            try:
                await engine.base()
            except LorryError as error:
                engine.left(error)
                if engine.view is None:
                    raise
            return
        if unknown := [engine for engine in self.engines if engine.view is None and engine.away is None]:
            await _all(engine.check() for engine in unknown)
        for engine in self.engines:
            if engine.away is None and engine.old():
                engine.refresh()
        if not any(self._known()):
            await _all(engine.check() for engine in self.engines)  # the next look at them may be far
        if not any(self._known()):
            raise _away("no engine answers", self.engines)

    # Adapters

    async def loaded(self) -> Collection[str]:
        """Names of the adapters that any engine holds."""
        return {name for names in await self._each(Engine.loaded) for name in names}

    async def load(self, target: Target) -> None:
        """Load an adapter into the engine that a request for it would go to. Raises as EngineClient.load."""
        engine, _ = await _Route(self, target).run(lambda engine: engine.load(target))
        engine.open_requests -= 1

    async def repin(self, target: Target) -> None:
        """Tell every engine that holds an adapter whether it is pinned."""
        await self._each(lambda engine: engine.repin(target))

    async def unload(self, name: str) -> None:
        """Unload a name from every engine that answers; nothing happens where it is not loaded."""
        await self._each(lambda engine: engine.unload(name))

    async def forget(self, name: str) -> None:
        """An adapter and its checkpoints leave every engine; one that is away has to load what is called so next."""
        for engine in self.engines:
            engine.drop(name)

        async def leave(engine: Engine) -> None:
            for ref in await engine.loaded():
                if is_of(ref, name):
                    await engine.unload(ref)

        try:
            await self._each(leave)
        except LorryError:
            pass

    async def _each(self, call: Callable[[Engine], Awaitable[T]]) -> list[T]:
        """What those say that answer. Raises what the first that answers objects, or Unavailable if none answers."""
        asked = [engine for engine in self.engines if engine.away is None] or self.engines
        said = await asyncio.gather(*(call(engine) for engine in asked), return_exceptions=True)
        good: list[T] = []
        errors: list[BaseException] = []
        for engine, result in zip(asked, said, strict=True):
            if not isinstance(result, BaseException):
                good.append(result)
                continue
            if isinstance(result, EngineAway):
                engine.left(result)
            errors.append(result)
        worse = [error for error in errors if not isinstance(error, Unavailable)]
        if worse or (errors and not good):
            raise (worse or errors)[0]
        return good

    # Answers

    @asynccontextmanager
    async def generate(
        self, body: Mapping[str, Any], target: Target, *, chat: bool = False, whole: bool = False
    ) -> AsyncIterator[Generation]:
        """Start a completion (or chat completion) and hand out its pieces; leaving the block aborts it.

        `body` is the request without model and stream. With `whole` no piece comes before the last one, and an engine may
        break off until then. Raises what EngineClient.open does.
        """
        generation = Generation(_Route(self, target), body, chat=chat, whole=whole)
        try:
            await generation.begin()
            yield generation
        finally:
            await generation.aclose()

    async def choose(self, target: Target, tried: Collection[Engine]) -> Engine:
        """The engine that is to answer next.

        Raises Conflict (wrong_base) if no engine holds the base, Unavailable if one that may hold it is away.
        """
        if len(self.engines) == 1:
            return self.engines[0]
        await self._know()
        if not (here := self.fitting(target)):
            away = [e for e in self.engines if e.away is not None and e not in tried and _fits(e, target) is not False]
            await _all(engine.check() for engine in away)
            here = self.fitting(target)
        if not (free := [engine for engine in here if engine not in tried]):
            raise self._none(target)
        if target.path is not None and not any(engine.holds(target) for engine in here):
            looks = [engine.look() for engine in here if engine.old(RESIDENT_TTL)]
            if looks:
                await _all(looks, PATIENCE)

        def order(engine: Engine) -> tuple[bool, bool, int, int]:
            foreign = target.path is None or not engine.holds(target)
            return engine.asleep, foreign, engine.open_requests, engine.adapters()

        return min(free, key=order)

    def fitting(self, target: Target) -> list[Engine]:
        """Those that answer and hold its base."""
        return [engine for engine in self.engines if engine.away is None and _fits(engine, target)]

    def _none(self, target: Target) -> LorryError:
        away = [engine for engine in self.engines if engine.away is not None and _fits(engine, target) is not False]
        if away:
            return _away(f"no engine that answers holds {target.base}", away)
        held = ", ".join(dict.fromkeys(base.name for _, base in self._known()))
        what = f"the adapter {target.name} was trained on" if target.path is not None else "the request is for"
        return Conflict(f"{what} {target.base}; the engines hold {held}", code="wrong_base")


class _Route:
    """A request's way: the engines where it has been to no avail, and what they said."""

    def __init__(self, engines: Engines, target: Target) -> None:
        self.target = target
        self._engines = engines
        self._tried: list[Engine] = []
        self._breaks = 0
        self._error: LorryError | None = None

    async def run(self, call: Callable[[Engine], Awaitable[T]]) -> tuple[Engine, T]:
        """One fitting engine after the other, until one has done it; its count of open requests includes this one."""
        while True:
            engine = await self._next()
            engine.open_requests += 1
            try:
                result = await call(engine)
            except BaseException as error:
                engine.open_requests -= 1
                if not isinstance(error, LorryError):
                    raise
                self.failed(engine, error)
                continue
            if engine.away is not None:
                engine.back()
            return engine, result

    def goes_on(self) -> bool:
        """Whether another engine, that has not been asked and is awake, could do it."""
        return any(e not in self._tried and not e.asleep for e in self._engines.fitting(self.target))

    async def _next(self) -> Engine:
        if self._error is not None and len(self._tried) == len(self._engines.engines):
            raise self._error
        try:
            return await self._engines.choose(self.target, self._tried)
        except LorryError:
            if self._error is not None:
                raise self._error from None
            raise

    def failed(self, engine: Engine, error: LorryError) -> None:
        """Note what an engine said. Raises it if another one is not to be asked."""
        self._tried.append(engine)
        if isinstance(error, EngineAway) or error.code == "shutting_down":
            engine.left(error)
        elif error.code == "engine_failed":
            engine.suspect()
        elif error.code == "engine_asleep":
            engine.slept()
        elif error.code in ("wrong_base", "not_servable", "no_room_for_adapter"):
            engine.doubt()  # it may hold another base than a while ago, or be another kind of engine
        elif not isinstance(error, Unavailable):
            raise error
        if error.code == "engine_failed" or (isinstance(error, EngineAway) and error.begun):
            self._breaks += 1
            if self._breaks >= MOST_BREAKS:
                raise error
        if self._error is None or error.code == "queue_full":
            self._error = error


class Generation:
    """The pieces of an answer as they come, from whichever engine gives it; `usage` and `timings` are right at the end."""

    def __init__(self, route: _Route, body: Mapping[str, Any], *, chat: bool, whole: bool) -> None:
        self._route = route
        self._body = body
        self._chat = chat
        self._whole = whole
        self._began = time.monotonic()
        self._given = False  # whether a piece has been handed out
        self._open: tuple[Engine, Answer] | None = None

    @property
    def _answer(self) -> Answer:
        assert self._open is not None
        return self._open[1]

    @property
    def usage(self) -> Usage:
        return self._answer.usage

    @property
    def timings(self) -> Timings:
        return self._answer.timings

    async def begin(self) -> None:
        """Have an engine begin with it."""
        target = self._route.target
        self._open = await self._route.run(
            lambda engine: engine.open(self._body, target, chat=self._chat, began=self._began)
        )
        self._answer.movable = lambda: not self._given and self._route.goes_on()

    async def aclose(self) -> None:
        if self._open is not None:
            engine, answer = self._open
            self._open = None
            engine.open_requests -= 1
            await engine.close(answer)

    async def __aiter__(self) -> AsyncIterator[Piece]:
        async for batch in self.batches():
            for piece in batch:
                yield piece

    async def batches(self) -> AsyncIterator[list[Piece]]:
        """The pieces, those together that have come together: one when there is time, more when there is much to do."""
        while True:
            kept: list[list[Piece]] = []
            try:
                async for batch in self._answer.batches():
                    if self._whole:
                        kept.append(batch)
                    else:
                        self._given = True
                        yield batch
                break
            except Unavailable as error:
                assert self._open is not None
                self._route.failed(self._open[0], error)
                if self._given:
                    raise
                await self.aclose()
                await self.begin()
        for batch in kept:
            yield batch


class _EnginesCollector(Collector):
    """What this API process knows and does; other processes have gauges of their own."""

    def __init__(self, engines: list[Engine]) -> None:
        self._engines = engines

    def describe(self) -> list[Metric]:
        return []  # else registering would collect

    def collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("lorry_engine_up", "Whether the engine answers this API process.", labels=["engine"])
        text = "Requests that this API process has open at the engine."
        open_requests = GaugeMetricFamily("lorry_engine_open_requests", text, labels=["engine"])
        asleep = GaugeMetricFamily("lorry_engine_asleep", "Whether a job has the engine's memory.", labels=["engine"])
        for engine in self._engines:
            if engine.view is not None or engine.away is not None:  # no sample: unknown is not zero
                up.add_metric([engine.name], engine.away is None)
            if engine.away is None:
                asleep.add_metric([engine.name], engine.asleep)
            open_requests.add_metric([engine.name], engine.open_requests)
        yield up
        yield asleep
        yield open_requests


def _fits(engine: Engine, target: Target) -> bool | None:
    """Whether it holds the base, or held it when it was last here; None if nothing is known of it."""
    return None if engine.view is None else base_key(target.base) in engine.view.base.keys


def _away(what: str, engines: Iterable[Engine]) -> Unavailable:
    reasons = "; ".join(f"{engine.name}: {engine.away or 'not asked yet'}" for engine in engines)
    return Unavailable(f"{what} ({reasons})", code="engine_unavailable")


async def _all(asked: Iterable[Awaitable[Any]], timeout: float | None = None) -> None:
    """Await them together, at most so long; what they raise is of no interest."""
    try:
        async with asyncio.timeout(timeout):
            await asyncio.gather(*asked, return_exceptions=True)
    except TimeoutError:
        pass
