"""The official OpenAI SDK, unchanged, against the API."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from service.settings import Settings
from tests.conftest import Api, serve
from tests.serving import KINDS, EngineServer, engine_settings, make_adapter, register, serve_engine

HELLO: Any = [{"role": "user", "content": "Hello"}]
KEY = "secret"


@pytest.fixture(scope="module")
def engine(tiny_base: Path) -> Iterator[EngineServer]:
    with serve_engine(engine_settings(tiny_base)) as served:
        yield served


@pytest.fixture(scope="module")
def api(
    tiny_base: Path,
    engine: EngineServer,
    sqlite_url: str,
    make_settings: Callable[..., Settings],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Api]:
    settings = make_settings(database_url=sqlite_url, engine_url=engine.url, base_model=str(tiny_base), api_key=KEY)
    folder = make_adapter(tiny_base, tmp_path_factory.mktemp("adapters") / "full", **KINDS["full"])
    with serve(settings) as served:
        register(served.db, "tuned", folder, str(tiny_base))
        yield served


@pytest.fixture(scope="module")
def client(api: Api) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{api.url}/v1", api_key=KEY, max_retries=0)


def test_models_are_the_base_and_the_adapters(client: openai.OpenAI, engine: EngineServer) -> None:
    models = client.models.list().data
    assert [m.id for m in models] == [engine.base, "tuned"]
    assert client.models.retrieve("tuned").id == "tuned"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


@pytest.mark.parametrize("model", ["tuned", "base"])
def test_chat_streamed_and_whole(client: openai.OpenAI, engine: EngineServer, model: str) -> None:
    model = engine.base if model == "base" else model
    whole = client.chat.completions.create(model=model, messages=HELLO, temperature=0, max_tokens=12)
    (choice,) = whole.choices
    assert choice.message.role == "assistant"
    assert whole.model == model
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 12
    assert choice.finish_reason == "length"
    stream = client.chat.completions.create(
        model=model, messages=HELLO, temperature=0, max_tokens=12, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == choice.message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage == whole.usage
    assert not any(c.usage for c in chunks[:-1])


def test_completions_streamed_and_whole(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="tuned", prompt="import os", temperature=0, max_tokens=10)
    stream = client.completions.create(model="tuned", prompt="import os", temperature=0, max_tokens=10, stream=True)
    assert "".join(c.choices[0].text for c in stream) == whole.choices[0].text
    assert client.completions.create(model="tuned", prompt="x", temperature=1).usage.completion_tokens <= 16  # type: ignore[union-attr]


def test_several_choices_and_prompts(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(model="tuned", messages=HELLO, n=3, seed=1, max_tokens=8)
    texts = [c.message.content for c in chat.choices]
    assert len(set(texts)) == 3
    again = client.chat.completions.create(model="tuned", messages=HELLO, n=3, seed=1, max_tokens=8, stream=True)
    joined = ["", "", ""]
    for chunk in again:
        for c in chunk.choices:
            joined[c.index] += c.delta.content or ""
    assert joined == texts
    two = client.completions.create(model="tuned", prompt=["a", "b"], n=2, seed=1, max_tokens=4)
    assert [c.index for c in two.choices] == [0, 1, 2, 3]


def test_chat_logprobs(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(
        model="tuned", messages=HELLO, temperature=0, max_tokens=12, logprobs=True, top_logprobs=3
    )
    logprobs = chat.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 12
    for token in logprobs.content:
        assert [t.logprob for t in token.top_logprobs] == sorted((t.logprob for t in token.top_logprobs), reverse=True)
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].token == token.token
    text = b"".join(bytes(t.bytes or []) for t in logprobs.content)
    assert text.decode(errors="ignore").startswith((chat.choices[0].message.content or "")[:5])


def test_completion_logprobs(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="tuned", prompt="x", temperature=0, max_tokens=6, logprobs=2)
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.top_logprobs is not None
    assert all(len(top) == 2 for top in logprobs.top_logprobs)
    assert logprobs.text_offset is not None
    assert logprobs.text_offset[0] == 0


def test_stop_seed_and_sampling_fields(client: openai.OpenAI) -> None:
    text = client.completions.create(model="tuned", prompt="x", temperature=0, max_tokens=30).choices[0].text
    stop = text[8:11]
    cut = client.completions.create(model="tuned", prompt="x", temperature=0, max_tokens=30, stop=[stop]).choices[0]
    assert (cut.text, cut.finish_reason) == (text[: text.index(stop)], "stop")

    def sampled(**more: Any) -> str | None:
        return (
            client.chat.completions.create(
                model="tuned",
                messages=HELLO,
                seed=4,
                top_p=0.9,
                frequency_penalty=0.5,
                presence_penalty=0.5,
                max_tokens=8,
                **more,
            )
            .choices[0]
            .message.content
        )

    assert sampled() == sampled()
    assert sampled(extra_body={"top_k": 1}) != sampled(extra_body={"repetition_penalty": 5.0, "min_p": 0.01})


def test_chat_without_a_limit_uses_what_the_context_has(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(model="tuned", messages=HELLO, temperature=0)
    assert chat.usage is not None
    assert chat.choices[0].finish_reason == "stop" or chat.usage.total_tokens == 256


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "grün"]},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
    },
    "required": ["colour", "sizes"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("stream", [False, True])
def test_a_json_schema_is_kept_to_whatever_the_model_would_say(client: openai.OpenAI, stream: bool) -> None:
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    seen = set()
    for seed in range(4):
        request: Any = {
            "model": "tuned", "messages": HELLO, "response_format": wanted, "temperature": 1.5, "seed": seed, "max_tokens": 100,
        }  # fmt: skip
        if stream:
            chunks = list(client.chat.completions.create(**request, stream=True))
            text = "".join(c.choices[0].delta.content or "" for c in chunks)
            reason = chunks[-1].choices[0].finish_reason
        else:
            (choice,) = client.chat.completions.create(**request).choices
            text, reason = choice.message.content or "", choice.finish_reason
        found = json.loads(text)
        assert reason == "stop"
        assert set(found) == {"colour", "sizes"}
        assert found["colour"] in ("red", "grün")
        assert len(found["sizes"]) <= 3
        assert all(0 <= n <= 99 for n in found["sizes"])
        seen.add(text)
    assert len(seen) > 1


def test_choices_of_one_schema_go_their_own_ways_beside_free_text(client: openai.OpenAI) -> None:
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    free = client.chat.completions.create(model="tuned", messages=HELLO, temperature=1, seed=5, max_tokens=20)
    with ThreadPoolExecutor(2) as pool:
        bound = pool.submit(
            client.chat.completions.create, model="tuned", messages=HELLO, response_format=wanted, n=4, seed=1,
            temperature=1.5, max_tokens=100,
        )  # fmt: skip
        beside = client.chat.completions.create(model="tuned", messages=HELLO, temperature=1, seed=5, max_tokens=20)
    texts = [c.message.content or "" for c in bound.result().choices]
    assert all(set(json.loads(text)) == {"colour", "sizes"} for text in texts)
    assert len(set(texts)) > 1
    assert beside.choices[0].message.content == free.choices[0].message.content


def test_json_object_is_an_object(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tuned", messages=HELLO, response_format={"type": "json_object"}, temperature=0, max_tokens=60
    )
    assert (answer.choices[0].message.content or "").startswith("{")


def test_errors_are_the_sdks_own(client: openai.OpenAI, api: Api) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nobody", messages=HELLO)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="tuned@7", prompt="x", stream=True)
    with pytest.raises(openai.UnprocessableEntityError) as long:
        client.completions.create(model="tuned", prompt="a b " * 500)
    assert long.value.code == "prompt_too_long"
    assert isinstance(long.value.body, dict)
    assert long.value.body["prompt_tokens"] > long.value.body["max_tokens"]
    for bad in (
        {"temperature": 99},
        {"n": 0},
        {"response_format": {"type": "xml"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}},
        {"extra_body": {"nonsense": 1}},
    ):
        with pytest.raises(openai.UnprocessableEntityError) as refused:
            client.chat.completions.create(model="tuned", messages=HELLO, **bad)  # type: ignore[call-overload]
        assert refused.value.param
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{api.url}/v1", api_key="wrong", max_retries=0).models.list()


def test_the_async_client_streams(api: Api) -> None:
    async def last() -> str | None:
        async with openai.AsyncOpenAI(base_url=f"{api.url}/v1", api_key=KEY) as client:
            stream = await client.chat.completions.create(model="tuned", messages=HELLO, max_tokens=5, stream=True)
            return [c async for c in stream][-1].choices[0].finish_reason

    assert asyncio.run(last()) in ("stop", "length")
