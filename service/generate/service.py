"""From a request to the engine's: find the adapter, render the prompt with its template, join the answer's pieces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from service.adapters.service import Resolved, resolve
from service.db import Database
from service.engine_client import Target
from service.engines import Engines, Generation
from service.errors import Invalid, Unavailable
from service.generate.schemas import (
    GenerateRequest,
    GenerateResponse,
    GenerateTimings,
    GenerateUsage,
    TokenLogprob,
    TopLogprob,
)
from service.openai.wire import Piece, TokenInfo
from service.storage import Storage
from service.templates import StoredTemplate, render_generation


@dataclass(frozen=True)
class Source:
    """What answers, and the template its prompts are rendered with.

    `template` is None for the base of an engine that does not tell it (vLLM); that engine then renders by itself.
    """

    target: Target
    template: StoredTemplate | None


def find(db: Database, storage: Storage, ref: str) -> Source:
    """An adapter or checkpoint by reference. Raises NotFound (adapter_not_found) and StorageUnavailable."""
    with db.read() as session:
        found: Resolved = resolve(session, storage, ref)
    return Source(found.target, StoredTemplate.model_validate(found.template))


async def base_source(engine: Engines, name: str | None = None) -> Source | None:
    """The base of this name, None if no engine holds it; without a name the usual one."""
    base = await engine.base(name)
    return Source(Target(base.name, None, base.name), base.template) if base is not None else None


@dataclass(frozen=True)
class EngineCall:
    """A request to the engine: to its chat completions where it has to render the conversation itself."""

    body: dict[str, Any]
    chat: bool = False


def engine_call(
    source: Source,
    sampling: Mapping[str, Any],
    stops: Sequence[str],
    *,
    prompt: str | None = None,
    messages: Sequence[Mapping[str, Any]] | None = None,
    inputs: Mapping[str, Any] | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> EngineCall:
    """Render and put together. `sampling` holds vLLM's names, with logprobs as in completions; Nones are left out.

    Raises Invalid with `param` where template and request do not fit.
    """
    # A null limit is "what the context has left" to both engines; without one, completions end after 16 tokens.
    body = {k: v for k, v in sampling.items() if v is not None or k == "max_tokens"}
    body["return_token_ids"] = True
    template = source.template
    ends = [] if template is None or body.get("ignore_eos") else template.stop
    if stop := list(dict.fromkeys([*stops, *ends])):
        body["stop"] = stop
    if template is not None:
        body["prompt"] = render_generation(template, prompt=prompt, messages=messages, inputs=inputs, tools=tools)
        body["add_special_tokens"] = False
        return EngineCall(body)
    if inputs is not None:
        raise Invalid("inputs: the base model has no prompt template; give prompt or messages", param="inputs")
    if messages is None:
        return EngineCall({**body, "prompt": prompt})
    logprobs = body.pop("logprobs", None)
    chat = {"logprobs": True, "top_logprobs": logprobs} if logprobs is not None else {}
    return EngineCall(
        {**body, **chat, "messages": list(messages), **({"tools": list(tools)} if tools else {})}, chat=True
    )


def call_of(request: GenerateRequest, source: Source) -> EngineCall:
    """The engine's request for POST /generate."""
    sampling = {
        "max_tokens": request.max_new_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k or None,
        "min_p": request.min_p or None,
        "repetition_penalty": request.repetition_penalty,
        "seed": request.seed,
        "logprobs": request.logprobs,
    }
    return engine_call(
        source,
        sampling,
        request.stops,
        prompt=request.prompt,
        messages=None if request.messages is None else [m.plain() for m in request.messages],
        inputs=request.inputs,
        tools=request.tools,
    )


def answer(gen_id: str, request: GenerateRequest, whole: Piece, generation: Generation) -> GenerateResponse:
    """The joined pieces as POST /generate answers them."""
    ids = whole.token_ids or []
    usage, timings = generation.usage, generation.timings
    return GenerateResponse(
        id=gen_id,
        adapter=request.adapter,
        text=whole.text,
        token_ids=ids,
        finish_reason=cast(Any, finish_reason(whole)),
        usage=GenerateUsage(prompt_tokens=usage.prompt_tokens, completion_tokens=usage.completion_tokens),
        timings=GenerateTimings(
            queue_ms=timings.queue_ms, first_token_ms=timings.first_token_ms, total_ms=timings.total_ms
        ),
        logprobs=None if request.logprobs is None else logprobs_of(whole.tokens or [], ids, request.logprobs),
    )


def finish_reason(piece: Piece) -> str:
    """Raises Unavailable if the engine gave up on the request."""
    if piece.finish_reason not in ("stop", "length"):
        raise Unavailable(f"the engine ended the request: {piece.finish_reason}", code="engine_aborted")
    return piece.finish_reason


def logprobs_of(tokens: Sequence[TokenInfo], ids: Sequence[int], top: int) -> list[TokenLogprob]:
    return [
        TokenLogprob(
            token_id=ids[i] if i < len(ids) else None,
            token=t.token,
            logprob=t.logprob,
            top=[TopLogprob(token=token, logprob=value) for token, value in t.top[:top]],
        )
        for i, t in enumerate(tokens)
    ]
