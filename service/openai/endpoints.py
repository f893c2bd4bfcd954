"""OpenAI's models, completions and chat completions; `model` is an adapter's name, name@step, or the base's name."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from sqlalchemy import select

from service.db import Database
from service.deps import DbDep, EngineDep, SettingsDep
from service.disconnect import ClientGone, unless_gone
from service.engines import Engines, Generation
from service.errors import LorryError, NotFound
from service.generate.service import EngineCall, Source, base_source, engine_call, find, finish_reason
from service.ids import new_id
from service.json_body import Writable
from service.models import AdapterRow
from service.openai.schemas import ChatCompletionRequest, CompletionRequest, SamplingBody
from service.openai.wire import DONE, ChatWriter, CompletionWriter, Piece, Writer, event
from service.settings import Settings
from service.shutdown import stopping
from service.sse import EventStream
from service.storage import open_storage

router = APIRouter(prefix="/v1", tags=["openai"])
_STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "OpenAI's object, or with stream=true its chunks as server-sent events, ended by [DONE].",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}


class Model(BaseModel):
    """OpenAI's Model object."""

    id: str = Field(description="What goes into `model`.")
    object: Literal["model"] = Field("model", description="Always 'model'.")
    created: int = Field(description="When it was made, Unix seconds; for the base, since when it is served.")
    owned_by: str = Field("lorry", description="Always 'lorry'.")
    parent: str | None = Field(description="The base of an adapter, null for the base itself.")


class ModelList(BaseModel):
    object: Literal["list"] = Field("list", description="Always 'list'.")
    data: list[Model] = Field(description="The bases, then every adapter that is ready.")


@router.get("/models", response_model=ModelList, summary="List models")
async def list_models(db: DbDep, engine: EngineDep, settings: SettingsDep) -> ModelList:
    """The bases the engines hold and every adapter that is ready, loaded or not."""
    return ModelList(data=await _models(db, engine, settings))


@router.get("/models/{model:path}", response_model=Model, summary="Retrieve a model")
async def retrieve_model(
    model: Annotated[str, Path(description="A model's id; a base's may hold slashes.")],
    db: DbDep,
    engine: EngineDep,
    settings: SettingsDep,
) -> Model:
    found = next((m for m in await _models(db, engine, settings) if m.id == model), None)
    if found is None:
        raise _no_model(model)
    return found


@router.post(
    "/completions", response_model=None, dependencies=[Writable], summary="Complete a prompt", responses=_STREAM
)
async def completions(
    body: CompletionRequest, request: Request, db: DbDep, engine: EngineDep, settings: SettingsDep
) -> Response:
    """OpenAI's completions. A text prompt gets the model's BOS if it wants one; token ids are taken as they are."""
    source = await _source(body.model, db, settings, engine)
    sampling = {**_sampling(body), "max_tokens": body.max_tokens, "logprobs": body.logprobs}
    prompts = body.prompts
    if isinstance(prompts[0], str):
        calls = [engine_call(source, sampling, body.stops, prompt=p) for p in prompts if isinstance(p, str)]
        rendered: Any = [c.body["prompt"] for c in calls]
        call = EngineCall({**calls[0].body, "prompt": rendered[0] if len(rendered) == 1 else rendered})
    else:
        call = EngineCall({**engine_call(source, sampling, body.stops, prompt="").body, "prompt": prompts})
    writer = CompletionWriter(new_id("cmpl"), body.model, with_token_ids=bool(body.return_token_ids))
    choices = len(prompts) * body.n
    return await _respond(request, engine, settings.sse_ping_seconds, body, source, call, writer, choices)


@router.post(
    "/chat/completions",
    response_model=None,
    dependencies=[Writable],
    summary="Answer a conversation",
    responses=_STREAM,
)
async def chat_completions(
    body: ChatCompletionRequest, request: Request, db: DbDep, engine: EngineDep, settings: SettingsDep
) -> Response:
    """OpenAI's chat completions. The conversation is rendered with the template stored with the adapter."""
    source = await _source(body.model, db, settings, engine)
    sampling = {**_sampling(body), "max_tokens": body.limit, "logprobs": body.num_logprobs}
    call = engine_call(
        source, sampling, body.stops, messages=[m.plain() for m in body.messages], tools=body.offered_tools
    )
    writer = ChatWriter(
        new_id("chatcmpl"), body.model, top_logprobs=body.top_logprobs or 0, with_token_ids=bool(body.return_token_ids)
    )
    return await _respond(request, engine, settings.sse_ping_seconds, body, source, call, writer, body.n)


def _sampling(body: SamplingBody) -> dict[str, Any]:
    names = (
        "n", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
        "seed", "stop_token_ids",
    )  # fmt: skip
    flags = {name: True for name in ("ignore_eos", "include_stop_str_in_output") if getattr(body, name)}
    out = {name: getattr(body, name) for name in names} | flags
    if body.text_schema is not None and body.response_format is not None:
        out["response_format"] = body.response_format.model_dump(by_alias=True, exclude_none=True)
    return out


async def _source(model: str, db: Database, settings: Settings, engine: Engines) -> Source:
    """An adapter, else a base by its name. Raises NotFound (model_not_found)."""
    try:
        return await asyncio.to_thread(find, db, open_storage(settings), model)
    except NotFound as error:
        base = await base_source(engine, model)
        if base is None:
            raise _no_model(model, error.message) from error
        return base


def _no_model(model: str, reason: str = "") -> NotFound:
    return NotFound(
        f"the model {model!r} does not exist{': ' * bool(reason)}{reason}", param="model", code="model_not_found"
    )


async def _models(db: Database, engine: Engines, settings: Settings) -> list[Model]:
    """Bases, then adapters; the configured base while no engine has answered yet: a list that shrinks would mislead."""
    try:
        bases = [Model(id=base.name, created=base.created, parent=None) for base in await engine.bases()]
    except LorryError:
        bases = [Model(id=settings.base_model, created=0, parent=None)]
    return [*bases, *await asyncio.to_thread(_ready, db)]


def _ready(db: Database) -> list[Model]:
    with db.read() as session:
        rows = session.scalars(select(AdapterRow).where(AdapterRow.ready).order_by(AdapterRow.name))
        return [Model(id=r.name, created=int(r.created_at), parent=r.base) for r in rows]


async def _respond(
    request: Request,
    engine: Engines,
    ping: float,
    body: SamplingBody,
    source: Source,
    call: EngineCall,
    writer: Writer,
    choices: int,
) -> Response:
    stack = AsyncExitStack()
    answer = engine.generate(call.body, source.target, chat=call.chat, whole=not body.stream)
    opened = stack.enter_async_context(answer)
    try:
        generation = await unless_gone(request, opened)
        if not body.stream:
            async with stack:
                return JSONResponse(await unless_gone(request, _whole(generation, writer, choices)))
    except ClientGone:
        return Response(status_code=499)
    include_usage = body.stream_options is not None and body.stream_options.include_usage
    return EventStream(
        _chunks(generation, writer, choices, include_usage, stack),
        ping=ping,
        farewell=event(stopping().body()) + DONE,
        cleanup=stack.aclose,  # for a client that left before the stream began
    )


async def _whole(generation: Generation, writer: Writer, choices: int) -> dict[str, Any]:
    pieces = [Piece(i) for i in range(choices)]
    async for piece in generation:
        pieces[piece.index].extend(piece)
    for piece in pieces:
        finish_reason(piece)
    return writer.answer(pieces, generation.usage, _lorry(generation))


async def _chunks(
    generation: Generation, writer: Writer, choices: int, include_usage: bool, stack: AsyncExitStack
) -> AsyncGenerator[bytes, None]:
    async with stack:
        try:
            for first in writer.first(range(choices)):
                yield event(first)
            async for batch in generation.batches():
                for piece in batch:
                    if piece.finish_reason is not None:
                        finish_reason(piece)
                yield b"".join(event(writer.chunk(piece)) for piece in batch)
            if include_usage:
                yield event(writer.usage(generation.usage, _lorry(generation)))
        except LorryError as error:
            yield event(error.body())
        yield DONE


def _lorry(generation: Generation) -> Mapping[str, Any]:
    return {"lorry": vars(generation.timings)}
