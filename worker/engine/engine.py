"""The engine's one thread: schedule → run → postprocess. What a step brought is handed to the event loop in one call.

Where the device can go on from tokens that the host has not seen, the next step is launched before the last one's tokens are
waited for: the device then has no pause while their text is made. Nothing changes in what a request gets.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from service.errors import Invalid, LorryError, Unavailable
from service.storage import Storage
from worker.engine.adapters import Adapter
from worker.engine.detokenize import Detokenizer, StopStrings
from worker.engine.grammar import Grammars
from worker.engine.lora import AdapterWeights
from worker.engine.metrics import EngineMetrics
from worker.engine.registry import AdapterRegistry, Room
from worker.engine.request import Delta, Request
from worker.engine.runner import ModelRunner
from worker.engine.sampling import Chosen, Sampled, choose
from worker.engine.scheduler import Scheduled, Scheduler
from worker.engine.sleep import Sleep, offload, restore

log = logging.getLogger("lorry.engine")
RETRY_AFTER = 2  # seconds; about what a place takes to become free


class EngineFailed(LorryError):
    """The engine stopped with requests under way."""

    status, type, code = 500, "server_error", "engine_failed"


def shutting_down() -> Unavailable:
    """The error of a request that the engine's end refuses or cuts short."""
    return Unavailable("the engine is shutting down", retry_after=10, code="shutting_down")


class RequestStream:
    """The loop's end of a request. Deltas nobody has fetched yet are joined, so a slow reader costs one delta of memory."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self._pending: Delta | None = None
        self._ready = asyncio.Event()

    def put(self, delta: Delta) -> None:
        if self._pending is None:
            self._pending = delta
        else:
            self._pending.extend(delta)
        self._ready.set()

    async def get(self) -> Delta:
        """The next delta; the last one has a finish reason."""
        await self._ready.wait()
        assert self._pending is not None
        delta, self._pending = self._pending, None
        self._ready.clear()
        return delta


@dataclass(slots=True)
class _Live:
    """A request under way, with what turns its tokens into text."""

    request: Request
    stream: RequestStream
    tokenizer: Any
    detokenizer: Detokenizer
    stops: StopStrings
    characters: int = 0


@dataclass(slots=True)
class _Flight:
    """A step that was launched; its tokens have not been taken in yet."""

    size: int
    sampling: list[Scheduled]
    chosen: Chosen | None
    began: float


class Engine:
    """Owns the model and the thread that runs it. Everything but the thread's own methods is called from the event loop."""

    def __init__(
        self, runner: ModelRunner, *, max_batch: int, max_queue: int, room: Room, storage: Storage | None = None
    ) -> None:
        self.runner = runner
        self.metrics = EngineMetrics()
        self.scheduler = Scheduler(
            num_blocks=runner.num_blocks,
            block_size=runner.cache.block_size,
            max_batch=max_batch,
            max_queue=max_queue,
            max_step_tokens=runner.max_step_tokens,
        )
        self.adapters = AdapterRegistry(
            runner.base_info(),
            room,
            runner.bank.install,
            self.metrics.evictions.inc,
            lambda source: self.metrics.adapter_reads.labels(source).inc(),
            open_folder=(lambda address: storage.using(storage.from_address(str(address)))) if storage else None,
        )
        self.metrics.cache_blocks.set(runner.num_blocks)
        self.grammars = Grammars(runner.vocab_size)
        self.fatal: BaseException | None = None
        self.draining = False
        self.steps = 0
        self._collected_at = 0.0
        self._preemptions = 0
        self._live: dict[str, _Live] = {}  # the thread's own
        self._new: list[_Live] = []
        self._aborted: list[Request] = []
        self._failure: LorryError | None = None
        self._stopping = False
        self._wake = threading.Condition()
        self.sleep = Sleep(self._wake, self._lay_down, self._get_up)
        self.adapters.gate = self.sleep.check
        self._loop: asyncio.AbstractEventLoop | None = None
        self._on_fatal: Callable[[], None] = lambda: None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self, loop: asyncio.AbstractEventLoop, on_fatal: Callable[[], None] = lambda: None) -> None:
        """Begin. `on_fatal` is called in the loop, after every open request has been told."""
        self._loop, self._on_fatal = loop, on_fatal
        self._thread.start()

    def submit(self, requests: list[Request], adapter: Adapter | None) -> list[RequestStream]:
        """Queue requests, all or none.

        Raises Unavailable (queue_full, shutting_down, engine_asleep), Invalid for more than could ever be under way, or
        EngineFailed.
        """
        tokenizer = adapter.tokenizer if adapter else self.runner.tokenizer
        with self._wake:
            if self.fatal is not None:
                raise EngineFailed(f"the engine has failed: {self.fatal}")
            if self.draining:
                raise shutting_down()
            self.sleep.check()
            places = self.scheduler.max_batch + self.scheduler.max_queue
            if len(requests) > places:
                raise Invalid(
                    f"n: {len(requests)} completions are asked for; the engine takes {places} at once", param="n"
                )
            if len(requests) > self.scheduler.room() - len(self._new):
                self.metrics.refused.inc(len(requests))
                raise Unavailable(
                    f"the engine's queue is full: {places} requests are under way",
                    retry_after=RETRY_AFTER,
                    code="queue_full",
                )
            streams = []
            for request in requests:
                stream = RequestStream(request)
                stops = StopStrings(request.params.stop, include=request.params.include_stop_str_in_output)
                self._new.append(_Live(request, stream, tokenizer, Detokenizer(tokenizer, request.prompt_ids), stops))
                streams.append(stream)
            self._wake.notify()
        return streams

    def abort(self, request: Request) -> None:
        """Forget a request before the next step; its place and memory are free then. Nothing more comes out of it."""
        with self._wake:
            self._aborted.append(request)
            self._wake.notify()

    def fail_open(self, error: LorryError) -> None:
        """End every open request with this error, before the next step."""
        with self._wake:
            self._failure = error
            self._wake.notify()

    def stop(self, timeout: float = 10.0) -> None:
        """End the thread after its current step."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(timeout)

    # The thread's side

    def _run(self) -> None:
        try:
            flight: _Flight | None = None
            while self._intake(wait=flight is None):
                # Never between a step's launch and its end.
                if flight is None and not self.sleep.turn(self.scheduler.has_work()):
                    continue
                flight = flight or self._launch(self.scheduler.schedule())
                if flight is None:
                    continue
                following = self._launch_ahead(flight)
                outputs = self._collect(flight)
                if outputs:
                    self._hand_over(outputs)
                flight = following
        except BaseException as error:
            log.critical("the engine failed", exc_info=error)
            with self._wake:
                self.fatal = error
                waiting = [*self._live.values(), *self._new]
                self._new = []
            failure = EngineFailed(f"the engine failed: {type(error).__name__}: {error}")
            self._hand_over([(live.stream, self._end(live, "error", failure)) for live in waiting])
            self._call(self._on_fatal)

    def _intake(self, *, wait: bool) -> bool:
        """Take over what the loop has asked for; if told so, wait while there is nothing to do. Returns False to end."""
        with self._wake:
            while wait and not (self._new or self._aborted or self._failure or self._stopping or self._has_to_do()):
                self._wake.wait(self.sleep.seconds())
            if self._stopping:
                return False
            new, self._new = self._new, []
            aborted, self._aborted = self._aborted, []
            failure, self._failure = self._failure, None
            # Added under the lock: `submit` counts what is in the scheduler and what is in `_new`.
            for live in new:
                self._live[live.request.id] = live
                self.scheduler.add(live.request)
        for live in new:
            self.metrics.prompt_tokens.labels(live.request.key).inc(len(live.request.prompt_ids))
        for request in aborted:
            if request.id in self._live:
                self._end(self._live[request.id], "abort")
        if failure is not None:
            self._hand_over([(live.stream, self._end(live, "error", failure)) for live in list(self._live.values())])
        return True

    def _has_to_do(self) -> bool:
        work = self.scheduler.has_work()
        return self.sleep.due(work) or (work and not self.sleep.asleep)

    def _lay_down(self) -> None:
        self.metrics.paused.inc(self.scheduler.preempt_all())
        self.metrics.sleeping.set(1)
        self.metrics.sleeps.inc()
        self.adapters.settle()
        offload(self.runner, self._adapters_in_use())

    def _get_up(self) -> None:
        restore(self.runner, self._adapters_in_use())
        self.metrics.sleeping.set(0)

    def _adapters_in_use(self) -> list[AdapterWeights]:
        """Those of the registry, and those that left it and have requests still."""
        held = [adapter.weights for adapter in self.adapters.held()]
        return held + [live.request.adapter for live in self._live.values() if live.request.adapter is not None]

    def _launch(self, step: list[Scheduled], previous: Chosen | None = None) -> _Flight | None:
        """Run a step up to the choice of its tokens, without waiting for them. None for an empty step."""
        if not step:
            return None
        began = time.monotonic()
        logits, sampling = self.runner.forward(step) if previous is None else self.runner.forward(step, previous)
        for scheduled in step:
            self.scheduler.computed(scheduled)
        chosen = choose(logits, [s.request for s in sampling]) if sampling else None
        for s in sampling:
            s.request.pending += 1
        return _Flight(len(step), sampling, chosen, began)

    def _launch_ahead(self, flight: _Flight) -> _Flight | None:
        """Launch the step after `flight`, if it needs nothing that the host learns from `flight`'s tokens but themselves."""
        if flight.chosen is None or not all(s.request.runs_ahead for s in flight.sampling):
            return None
        if not self.runner.runs_ahead([s.request for s in flight.sampling]):
            return None
        with self._wake:
            if self.sleep.due(True):
                return None
        return self._launch(self.scheduler.ahead(), flight.chosen)

    def _collect(self, flight: _Flight) -> list[tuple[RequestStream, Delta]]:
        """Take in a step's tokens. Those of requests that have ended meanwhile are dropped."""
        sampled = flight.chosen.read() if flight.chosen is not None else []
        outputs = []
        for s, token in zip(flight.sampling, sampled, strict=True):
            s.request.pending -= 1
            live = self._live.get(s.request.id)
            if live is not None and live.request is s.request:
                outputs.append(self._advance(live, token))
        self.steps += 1
        now = time.monotonic()
        m = self.metrics
        m.step_seconds.observe(now - max(flight.began, self._collected_at))
        self._collected_at = now
        m.batch_size.observe(flight.size)
        m.running.set(len(self.scheduler.running))
        m.waiting.set(len(self.scheduler.waiting))
        m.cache_blocks_used.set(self.scheduler.pool.num_blocks - self.scheduler.pool.free)
        m.preemptions.inc(self.scheduler.preemptions - self._preemptions)
        self._preemptions = self.scheduler.preemptions
        return outputs

    def _advance(self, live: _Live, sampled: Sampled) -> tuple[RequestStream, Delta]:
        """Add a token to a request and end it if the token, its text or the length says so."""
        request, params = live.request, live.request.params
        if sampled.token_id is None:
            damaged = EngineFailed("the model's output is not a number; the adapter or the base is damaged")
            return live.stream, self._end(live, "error", damaged)
        token = sampled.token_id
        complete = False
        if request.grammar is not None:
            complete, fault = request.grammar.accept(token)
            if fault:
                return live.stream, self._end(
                    live, "error", Invalid(f"response_format: {fault}", param="response_format")
                )
        request.output_ids.append(token)
        if request.first_token_at is None:
            request.first_token_at = time.monotonic()
        delta = Delta(token_ids=[token], offsets=[live.characters])
        if sampled.logprob is not None:
            delta.logprobs = [sampled.logprob]
        if token in params.stop_token_ids:
            text = live.tokenizer.decode([token]) if params.include_stop_str_in_output else ""
            delta.text = live.stops.flush() + text
            return live.stream, self._end(live, "stop", delta=delta)
        text = live.detokenizer.feed(token)
        live.characters += len(text)
        delta.text, stop = live.stops.feed(text)
        if stop is not None:
            delta.stop_reason = stop
            return live.stream, self._end(live, "stop", delta=delta)
        if complete:
            delta.text += live.stops.flush()
            return live.stream, self._end(live, "stop", delta=delta)
        if len(request.output_ids) >= params.max_tokens:
            delta.text += live.stops.flush()
            return live.stream, self._end(live, "length", delta=delta)
        return live.stream, delta

    def _end(self, live: _Live, reason: Any, error: LorryError | None = None, *, delta: Delta | None = None) -> Delta:
        """Free a request's place and memory, and close its last delta."""
        request = live.request
        self.scheduler.finish(request)
        self._live.pop(request.id, None)
        now = time.monotonic()
        m, made = self.metrics, len(request.output_ids)
        m.requests.labels(request.key, reason).inc()
        m.completion_tokens.labels(request.key).inc(made)
        if request.scheduled_at is not None:
            m.queue_seconds.observe(request.scheduled_at - request.submitted_at)
        if request.first_token_at is not None:
            first = request.first_token_at - request.submitted_at
            m.first_token_seconds.observe(first)
            m.adapter_first_token_seconds.labels(request.key).observe(first)
            if made > 1:
                m.token_seconds.observe((now - request.first_token_at) / (made - 1))
        delta = delta or Delta()
        delta.finish_reason, delta.error, delta.timings = reason, error, request.timings(now)
        return delta

    def _hand_over(self, outputs: list[tuple[RequestStream, Delta]]) -> None:
        self._call(_put_all, outputs)

    def _call(self, function: Callable[..., None], *args: Any) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the loop is closed: the process is on its way out and nobody listens
            log.debug("event loop closed")


def _put_all(outputs: list[tuple[RequestStream, Delta]]) -> None:
    for stream, delta in outputs:
        stream.put(delta)
