"""From a body to requests, and from their deltas to an answer or a stream."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import Any

from fastapi import Request as HttpRequest
from fastapi import Response
from fastapi.responses import JSONResponse

from service.disconnect import ClientGone, unless_gone
from service.errors import Invalid, LorryError
from service.openai.schemas import ChatCompletionRequest, CompletionRequest, SamplingBody
from service.openai.wire import DONE, Piece, TokenInfo, Usage, Writer, event
from service.sse import EventStream
from service.templates import StoredTemplate, render_generation
from worker.engine.adapters import Adapter
from worker.engine.detokenize import token_text
from worker.engine.engine import Engine, RequestStream, shutting_down
from worker.engine.grammar import Grammar
from worker.engine.request import Delta, Request, SamplingParams


@dataclass(frozen=True)
class Job:
    """One HTTP request's generations, and what their pieces are made with."""

    id: str
    requests: list[Request]
    adapter: Adapter | None
    tokenizer: Any
    prompt_tokens: int


def model_cards(engine: Engine) -> list[dict[str, Any]]:
    """The base, then the adapters in memory, in vLLM's form; `lorry` holds what only lorry's API reads."""
    runner = engine.runner
    template = runner.template
    now = int(time.time())
    base = {
        "id": runner.name,
        "object": "model",
        "created": now,
        "owned_by": "lorry",
        "root": runner.path,
        "parent": None,
        "max_model_len": runner.max_model_len,
        "lorry": {
            "template": template.model_dump() if template else None,
            "load_in_4bit": runner.load_in_4bit,
            "max_adapters": engine.adapters.room.adapters,
        },
    }
    return [base] + [
        {
            "id": a.name,
            "object": "model",
            "created": now,
            "owned_by": "lorry",
            "root": str(a.path),
            "parent": runner.name,
            "lorry": {"bytes": a.bytes, "pinned": engine.adapters.pinned(a.name)},
        }
        for a in engine.adapters.held()
    ]


async def find_adapter(engine: Engine, model: str) -> Adapter | None:
    """None for the base. Reads an evicted adapter again, off the event loop. Raises NotFound (model_not_found)."""
    if model == engine.runner.name:
        return None
    return engine.adapters.peek(model) or await asyncio.to_thread(engine.adapters.get, model)


async def prepare_completion(engine: Engine, body: CompletionRequest) -> Job:
    adapter = await find_adapter(engine, body.model)
    tokenizer = adapter.tokenizer if adapter else engine.runner.tokenizer
    prompts: list[list[int]] = []
    for prompt in body.prompts:
        if isinstance(prompt, str):
            prompts.append(await _tokenise(tokenizer, prompt, body.add_special_tokens))
        else:
            if bad := next((i for i in prompt if not 0 <= i < engine.runner.vocab_size), None):
                raise Invalid(f"prompt: {bad} is no token of this model", param="prompt")
            prompts.append(prompt)
    stops = _stops(engine, body, tokenizer, adapter.template if adapter else None)
    grammars = await _grammars(engine, body, tokenizer, stops[1], len(prompts))
    return _job(engine, body, adapter, tokenizer, prompts, stops, grammars, body.max_tokens, body.logprobs)


async def prepare_chat(engine: Engine, body: ChatCompletionRequest) -> Job:
    adapter = await find_adapter(engine, body.model)
    tokenizer = adapter.tokenizer if adapter else engine.runner.tokenizer
    template = adapter.template if adapter else engine.runner.template
    if template is None:
        raise Invalid(f"messages: {body.model} has no chat template; use /v1/completions", param="messages")
    text = render_generation(template, messages=[m.plain() for m in body.messages], tools=body.offered_tools)
    ids = await _tokenise(tokenizer, text, False)
    stops = _stops(engine, body, tokenizer, template)
    grammars = await _grammars(engine, body, tokenizer, stops[1], 1)
    return _job(engine, body, adapter, tokenizer, [ids], stops, grammars, body.limit, body.num_logprobs)


async def _grammars(
    engine: Engine, body: SamplingBody, tokenizer: Any, ends: frozenset[int], prompts: int
) -> list[Grammar]:
    """One for each completion, or none. Raises Invalid (invalid_schema)."""
    schema = body.text_schema
    if schema is None:
        return []
    return await asyncio.to_thread(engine.grammars.compile, schema, tokenizer, ends, prompts * body.n)


async def _tokenise(tokenizer: Any, text: str, add_special_tokens: bool) -> list[int]:
    # In a thread: a long text takes longer than other streams' next event may wait.
    encoded = await asyncio.to_thread(tokenizer, text, add_special_tokens=add_special_tokens, verbose=False)
    return list(encoded["input_ids"])


def _job(
    engine: Engine,
    body: SamplingBody,
    adapter: Adapter | None,
    tokenizer: Any,
    prompts: list[list[int]],
    stops: tuple[tuple[str, ...], frozenset[int]],
    grammars: list[Grammar],
    max_tokens: int | None,
    logprobs: int | None,
) -> Job:
    longest = engine.runner.max_model_len
    name = adapter.name if adapter else ""
    stop, stop_ids = stops
    requests: list[Request] = []
    for ids in prompts:
        if not ids:
            raise Invalid("prompt: has no tokens", param="prompt")
        if len(ids) >= longest:
            raise Invalid(
                f"the prompt has {len(ids)} tokens; with at least one new token this model takes at most {longest}",
                param="prompt",
                code="prompt_too_long",
                extra={"prompt_tokens": len(ids), "max_tokens": longest},
            )
        for i in range(body.n):
            params = SamplingParams(
                max_tokens=min(max_tokens or longest, longest - len(ids)),
                temperature=1.0 if body.temperature is None else body.temperature,
                top_p=1.0 if body.top_p is None else body.top_p,
                top_k=max(0, body.top_k or 0),
                min_p=body.min_p or 0.0,
                repetition_penalty=body.repetition_penalty or 1.0,
                presence_penalty=body.presence_penalty or 0.0,
                frequency_penalty=body.frequency_penalty or 0.0,
                seed=None if body.seed is None else body.seed + i,
                logprobs=logprobs,
                stop=stop,
                stop_token_ids=stop_ids,
                include_stop_str_in_output=body.include_stop_str_in_output,
            )
            weights = adapter.weights if adapter else None
            grammar = grammars[len(requests)] if grammars else None
            requests.append(Request(uuid.uuid4().hex, ids, params, key=name, adapter=weights, grammar=grammar))
    return Job(f"cmpl-{uuid.uuid4().hex}", requests, adapter, tokenizer, sum(map(len, prompts)))


def _stops(
    engine: Engine, body: SamplingBody, tokenizer: Any, template: StoredTemplate | None
) -> tuple[tuple[str, ...], frozenset[int]]:
    """Stop strings and stop tokens. A string that is a special token is one of the latter: such a token has no text."""
    ids = set(body.stop_token_ids or ())
    strings: list[str] = []
    ends = [] if body.ignore_eos or template is None else template.stop
    for text in [*body.stops, *ends]:
        token = tokenizer.convert_tokens_to_ids(text)
        added = tokenizer.added_tokens_decoder.get(token) if token is not None else None
        if added is not None and added.special:
            ids.add(token)
        elif text not in strings:
            strings.append(text)
    if not body.ignore_eos:
        ids |= engine.runner.eos_token_ids
        if tokenizer.eos_token_id is not None:
            ids.add(tokenizer.eos_token_id)
    return tuple(strings), frozenset(ids)


async def respond(engine: Engine, job: Job, writer: Writer, body: SamplingBody, http: HttpRequest) -> Response:
    """Run a job. Whatever ends it early (a client that leaves, an error) aborts what is still running."""
    streams = engine.submit(job.requests, job.adapter)
    logprobs = job.requests[0].params.logprobs is not None
    if body.stream:
        include_usage = body.stream_options is not None and body.stream_options.include_usage
        chunks = _chunks(engine, job, streams, writer, logprobs, include_usage)
        farewell = event(shutting_down().body()) + DONE
        return EventStream(chunks, ping=None, farewell=farewell, cleanup=lambda: _abort(engine, streams))
    try:
        pieces, usage, timings = await unless_gone(http, _gather(job, streams, logprobs))
    except ClientGone:
        return Response(status_code=499)  # nobody reads it
    finally:
        await _abort(engine, streams)
    return JSONResponse(writer.answer(pieces, usage, {"lorry": timings}))


async def _abort(engine: Engine, streams: list[RequestStream]) -> None:
    for stream in streams:
        engine.abort(stream.request)


async def _gather(
    job: Job, streams: list[RequestStream], logprobs: bool
) -> tuple[list[Piece], Usage, dict[str, float]]:
    pieces: list[Piece] = []
    usage = Usage(job.prompt_tokens)
    timings: dict[str, float] = {}
    for index, stream in enumerate(streams):
        whole = Delta()
        while whole.finish_reason is None:
            whole.extend(await stream.get())
        if whole.error is not None:
            raise whole.error
        usage.completion_tokens += len(whole.token_ids)
        timings = whole.timings if index == 0 and whole.timings else timings
        pieces.append(_piece(job, index, whole, logprobs))
    return pieces, usage, timings


async def _chunks(
    engine: Engine, job: Job, streams: list[RequestStream], writer: Writer, logprobs: bool, include_usage: bool
) -> AsyncGenerator[bytes, None]:
    usage = Usage(job.prompt_tokens)
    timings: dict[str, float] = {}
    held: dict[int, Delta] = {}  # tokens whose text is not there yet travel with the next text
    try:
        for first in writer.first(range(len(streams))):
            yield event(first)
        async for index, delta in _merge(streams):
            if delta.error is not None:
                raise delta.error
            usage.completion_tokens += len(delta.token_ids)
            if index in held:
                earlier = held.pop(index)
                earlier.extend(delta)
                delta = earlier
            if not delta.text and delta.finish_reason is None:
                held[index] = delta
                continue
            extra = {"lorry": delta.timings} if delta.timings else None
            if index == 0 and delta.timings:
                timings = delta.timings
            yield event(writer.chunk(_piece(job, index, delta, logprobs), extra))
        if include_usage:
            yield event(writer.usage(usage, {"lorry": timings}))
        yield DONE
    except LorryError as error:
        yield event(error.body())
        yield DONE


async def _merge(streams: list[RequestStream]) -> AsyncIterator[tuple[int, Delta]]:
    """Deltas of several streams as they come, until each has ended."""
    if len(streams) == 1:
        while True:
            delta = await streams[0].get()
            yield 0, delta
            if delta.finish_reason is not None:
                return
    tasks = {asyncio.ensure_future(s.get()): i for i, s in enumerate(streams)}
    try:
        while tasks:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                index = tasks.pop(task)
                delta = task.result()
                if delta.finish_reason is None:
                    tasks[asyncio.ensure_future(streams[index].get())] = index
                yield index, delta
    finally:
        for task in tasks:
            task.cancel()


def _piece(job: Job, index: int, delta: Delta, logprobs: bool) -> Piece:
    tokens = None
    if logprobs:
        tokens = [
            TokenInfo(
                token_text(job.tokenizer, lp.token_id),
                lp.logprob,
                [(token_text(job.tokenizer, i), value) for i, value in lp.top],
                offset,
            )
            for lp, offset in zip(delta.logprobs, delta.offsets, strict=True)
        ]
    return Piece(index, delta.text, delta.token_ids, tokens, delta.finish_reason, delta.stop_reason)
