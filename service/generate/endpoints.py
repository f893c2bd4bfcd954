"""POST /generate: an adapter's (or the base's) text, as JSON or as server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from typing import Any

from fastapi import APIRouter, Request, Response

from service.db import Database
from service.deps import DbDep, EngineDep, SettingsDep
from service.disconnect import ClientGone, unless_gone
from service.engines import Engines, Generation
from service.errors import LorryError
from service.generate import service
from service.generate.schemas import GenerateRequest, GenerateResponse
from service.ids import new_id
from service.json_body import Writable
from service.openai.wire import Piece, compact
from service.settings import Settings
from service.shutdown import stopping
from service.sse import EventStream
from service.storage import open_storage

router = APIRouter(tags=["generate"])

_EVENTS = {
    "description": "JSON, or with stream=true server-sent events: `token` {index, text}, then one `done` with the JSON "
    "answer, or `error` with an error body.",
    "content": {"text/event-stream": {"schema": {"type": "string"}}},
}


@router.post(
    "/generate",
    response_model=GenerateResponse,
    dependencies=[Writable],
    summary="Generate text with an adapter or the base",
    responses={200: _EVENTS},
)
async def generate(body: GenerateRequest, request: Request, db: DbDep, engine: EngineDep, settings: SettingsDep) -> Any:
    """The prompt is rendered with the template that was stored when the adapter was trained. The adapter is loaded
    into an engine if none has it yet. A client that disconnects ends its generation."""
    source = await _source(body, db, settings, engine)
    call = service.call_of(body, source)
    stack = AsyncExitStack()
    answer = engine.generate(call.body, source.target, chat=call.chat, whole=not body.stream)
    opened = stack.enter_async_context(answer)
    gen_id = new_id("gen")
    try:
        # Before the first byte of the answer: what is wrong with the request still gets its own status.
        generation = await unless_gone(request, opened)
        if not body.stream:
            async with stack:
                return await unless_gone(request, _whole(gen_id, body, generation))
    except ClientGone:
        return Response(status_code=499)
    return EventStream(
        _stream(gen_id, body, generation, stack),
        ping=settings.sse_ping_seconds,
        farewell=_event("error", stopping().body()),
        cleanup=stack.aclose,  # for a client that left before the stream began
    )


async def _source(body: GenerateRequest, db: Database, settings: Settings, engine: Engines) -> service.Source:
    if body.adapter is None:
        usual = await service.base_source(engine)
        assert usual is not None
        return usual
    return await asyncio.to_thread(service.find, db, open_storage(settings), body.adapter)


async def _whole(gen_id: str, body: GenerateRequest, generation: Generation) -> GenerateResponse:
    whole = Piece(0)
    async for piece in generation:
        whole.extend(piece)
    return service.answer(gen_id, body, whole, generation)


async def _stream(
    gen_id: str, body: GenerateRequest, generation: Generation, stack: AsyncExitStack
) -> AsyncGenerator[bytes, None]:
    whole = Piece(0)
    index = 0
    async with stack:
        try:
            async for batch in generation.batches():
                events = []
                for piece in batch:
                    whole.extend(piece)
                    if piece.text:
                        events.append(_event("token", {"index": index, "text": piece.text}))
                        index += 1
                if events:
                    yield b"".join(events)
            yield _event("done", service.answer(gen_id, body, whole, generation).model_dump())
        except LorryError as error:
            yield _event("error", error.body())


def _event(name: str, data: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {compact(data)}\n\n".encode()
