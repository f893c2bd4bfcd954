"""The API with a server in the engine's place that speaks vLLM's protocol and nothing more.

No vLLM runs on a CPU-only machine, so the real engine's answers go through a proxy that takes lorry's additions out of
them and answers as vLLM 0.25 does where the two differ: names are not replaced, a request beyond the context is a 400,
errors have a number for a code.
"""

from __future__ import annotations

import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from service.settings import Settings
from tests.conftest import Api, serve
from tests.serving import KINDS, EngineServer, engine_settings, make_adapter, register, serve_engine, until

CONTEXT = 256


def vllm_error(status: int, message: str) -> JSONResponse:
    kind = {404: "NotFoundError", 400: "BadRequestError"}.get(status, "InternalServerError")
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": status}}, status)


def vllm(engine: EngineServer) -> FastAPI:
    app = FastAPI()
    http = httpx.AsyncClient(base_url=engine.url, timeout=60)
    tokenizer = engine.engine.runner.tokenizer

    @app.get("/v1/models")
    async def models() -> Any:
        body = (await http.get("/v1/models")).json()
        return body | {"data": [{k: v for k, v in card.items() if k != "lorry"} for card in body["data"]]}

    @app.post("/v1/load_lora_adapter")
    async def load(request: Request) -> Response:
        body = await request.json()
        assert set(body) == {"lora_name", "lora_path"}
        if body["lora_name"] in [c["id"] for c in (await models())["data"]]:
            return vllm_error(400, f"The lora adapter '{body['lora_name']}' has already been loaded.")
        answer = await http.post("/v1/load_lora_adapter", json=body)
        return Response(answer.content, answer.status_code, media_type=answer.headers["content-type"])

    @app.post("/v1/unload_lora_adapter")
    async def unload(request: Request) -> Response:
        body = await request.json()
        answer = await http.post("/v1/unload_lora_adapter", json=body)
        if answer.status_code == 404:
            return vllm_error(404, f"The lora adapter '{body['lora_name']}' cannot be found.")
        return Response(answer.content, answer.status_code)

    @app.post("/v1/{path:path}")
    async def generate(path: str, request: Request) -> Response:
        body = await request.json()
        if body["model"] not in [c["id"] for c in (await models())["data"]]:
            return vllm_error(404, f"The model `{body['model']}` does not exist.")
        if "prompt" in body:
            length = len(
                tokenizer(body["prompt"], add_special_tokens=body.get("add_special_tokens", True))["input_ids"]
            )
            if length + (body["max_tokens"] or 1) > CONTEXT:
                return vllm_error(
                    400,
                    f"This model's maximum context length is {CONTEXT} tokens. However, you requested {length} tokens in "
                    "the prompt. Please reduce the length of the input messages.",
                )
        upstream = await http.send(http.build_request("POST", f"/v1/{path}", json=body), stream=True)
        assert upstream.status_code == 200, await upstream.aread()

        async def bare() -> AsyncIterator[str]:
            try:
                async for line in upstream.aiter_lines():
                    if line.startswith("data: {"):
                        chunk = json.loads(line[6:])
                        chunk.pop("lorry", None)
                        line = f"data: {json.dumps(chunk)}"
                    yield f"{line}\n"
            finally:
                await upstream.aclose()

        return StreamingResponse(bare(), media_type="text/event-stream")

    return app


@pytest.fixture(scope="module")
def engine(tiny_base: Path) -> Iterator[EngineServer]:
    with serve_engine(engine_settings(tiny_base, engine_max_seq_length=CONTEXT)) as served:
        yield served


@pytest.fixture(scope="module")
def folders(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {n: make_adapter(tiny_base, root / n, seed=i, **KINDS["small"]) for i, n in enumerate(("one", "two"))}


@pytest.fixture(scope="module")
def api(
    tiny_base: Path,
    engine: EngineServer,
    folders: dict[str, Path],
    sqlite_url: str,
    make_settings: Callable[..., Settings],
) -> Iterator[Api]:
    server = uvicorn.Server(uvicorn.Config(vllm(engine), host="127.0.0.1", port=0, log_config=None))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    with serve(make_settings(database_url=sqlite_url, engine_url=url)) as served:
        for name, folder in folders.items():
            register(served.db, name, folder, str(tiny_base))
        register(served.db, "own", folders["one"], str(tiny_base), config={"train_embeddings": True})
        yield served
    server.should_exit = True
    thread.join(10)


def generate(api: Api, **body: Any) -> dict[str, Any]:
    response = api.http.post("/generate", json={"max_new_tokens": 12, **body})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_adapters_are_loaded_and_answer_with_measured_timings(api: Api, engine: EngineServer) -> None:
    one = generate(api, adapter="one", prompt="import os", logprobs=1)
    asked = {"model": "one", "prompt": "import os", "max_tokens": 12}
    assert one["text"] == engine.complete(**asked)["choices"][0]["text"]
    assert one["usage"]["completion_tokens"] == len(one["token_ids"]) == len(one["logprobs"]) == 12
    timings = one["timings"]
    assert 0 < timings["queue_ms"] <= timings["first_token_ms"] <= timings["total_ms"]
    assert generate(api, adapter="two", prompt="import os")["text"] != one["text"]


def test_an_adapter_the_server_forgot_is_loaded_again(api: Api, engine: EngineServer) -> None:
    before = generate(api, adapter="one", prompt="x")["text"]
    engine.engine.adapters.unload("one")
    assert generate(api, adapter="one", prompt="x")["text"] == before


def test_a_name_that_stands_for_other_files_is_replaced(
    api: Api, engine: EngineServer, folders: dict[str, Path]
) -> None:
    before = generate(api, adapter="one", prompt="x")["text"]
    engine.load("one", folders["two"])
    api.app.state.engine.engines[0]._loaded.clear()  # as in an API that was started since
    assert generate(api, adapter="one", prompt="x")["text"] == before


def test_messages_are_rendered_with_the_adapters_own_template_and_the_base_renders_itself(
    api: Api, engine: EngineServer
) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    for adapter in ("one", None):
        expected = engine.http.post(
            "/v1/chat/completions",
            json={"model": adapter or engine.base, "messages": messages, "max_tokens": 12, "temperature": 0},
        ).json()["choices"][0]["message"]["content"]
        assert generate(api, adapter=adapter, messages=messages, logprobs=2)["text"] == expected
    chat = {"model": "one", "messages": messages, "temperature": 0}  # no limit: what the context has left
    whole = api.http.post("/v1/chat/completions", json=chat)
    assert whole.status_code == 200, whole.text
    assert whole.json()["choices"][0]["finish_reason"] in ("stop", "length")


def test_a_prompt_for_the_base_goes_on(api: Api, engine: EngineServer) -> None:
    assert (
        generate(api, prompt="import os")["text"]
        == engine.complete(prompt="import os", max_tokens=12)["choices"][0]["text"]
    )


def test_an_adapter_that_vllm_cannot_take_is_refused_before_it_is_loaded(api: Api, engine: EngineServer) -> None:
    for path, body in (("/generate", {"adapter": "own", "prompt": "x"}), ("/v1/adapters/own/load", None)):
        refused = api.http.post(path, json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "not_servable")
        assert "export it as merged_16bit" in refused.json()["error"]["message"]
    assert "own" not in {a.name for a in engine.engine.adapters.held()}


def test_errors_keep_their_meaning(api: Api) -> None:
    long = api.http.post("/generate", json={"adapter": "one", "prompt": "a b " * 300})
    error = long.json()["error"]
    assert (long.status_code, error["code"]) == (422, "prompt_too_long")
    assert error["prompt_tokens"] > error["max_tokens"] == CONTEXT
    assert api.http.post("/generate", json={"adapter": "nobody", "prompt": "x"}).status_code == 404
    unfit = api.http.post("/generate", json={"inputs": {"a": "b"}})
    assert (unfit.status_code, unfit.json()["error"]["param"]) == (422, "inputs")
    assert api.http.post("/v1/adapters/one/unload").status_code == 200
    assert api.http.post("/v1/adapters/one/unload").status_code == 200  # nothing happens if it is not loaded
