"""`lorry engine`: the engine over HTTP, in OpenAI's protocol and with vLLM's calls for adapters.

On SIGTERM no new request is taken, open ones may end within a grace period, the rest end with an error event. A failure
of the engine's thread ends every open request with an error and the process with exit code 1, for a supervisor to
start it again.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import Field
from starlette.exceptions import HTTPException

from service.errors import Invalid, LorryError
from service.logs import configure
from service.openai.schemas import Body, ChatCompletionRequest, CompletionRequest
from service.openai.wire import ChatWriter, CompletionWriter
from service.server import Server, serve
from service.settings import Settings, get_settings
from service.shutdown import OpenRequests, Shutdown
from service.storage import open_storage
from service.telemetry import RequestLog
from worker.engine import handlers
from worker.engine.engine import Engine, shutting_down
from worker.engine.registry import room_for
from worker.engine.runner import ModelRunner
from worker.engine.sleep import limit_memory

log = logging.getLogger("lorry.engine")
GRACE_SECONDS = 10.0  # longest wait for open requests at SIGTERM
_HARD = 20.0  # seconds after it: the step under way has to end before the requests can be told


class LoadLoraAdapter(Body):
    """vLLM's body of POST /v1/load_lora_adapter."""

    lora_name: str = Field(min_length=1, max_length=255, description="Name under which the adapter is served.")
    lora_path: str = Field(
        min_length=1,
        description="Folder with adapter_config.json and adapter_model.safetensors, or its URL in the data root.",
    )
    load_inplace: bool = Field(True, description="Accepted: a name is always replaced.")
    pinned: bool | None = Field(None, description="Whether it stays when others need its place. Not vLLM's.")


class UnloadLoraAdapter(Body):
    """vLLM's body of POST /v1/unload_lora_adapter."""

    lora_name: str = Field(min_length=1, max_length=255, description="Name of the adapter.")
    lora_int_id: int | None = Field(None, description="Accepted and without effect.")


class SleepBody(Body):
    """A lease on the engine's memory."""

    owner: str = Field(min_length=1, max_length=255, description="Who asks; the same owner renews its lease.")
    lease_seconds: float = Field(
        60.0, gt=0, le=600, description="After this long without another call, the lease ends by itself."
    )
    grace_seconds: float = Field(
        10.0, ge=0, le=600, description="How long requests may take to end before they are paused."
    )
    expected_seconds: float | None = Field(
        None, ge=0, description="When the memory is expected to be free again; refused requests are told so."
    )


class WakeBody(Body):
    """The end of a lease."""

    owner: str = Field(min_length=1, max_length=255, description="Whose lease ends.")


def build_engine(settings: Settings) -> Engine:
    """Load the base model. Raises JobFailure, OSError or UnsupportedModel where that does not work."""
    limit_memory(settings.engine_memory_fraction)
    runner = ModelRunner(settings)
    return Engine(
        runner,
        max_batch=settings.engine_max_batch,
        max_queue=settings.engine_max_queue,
        room=room_for(settings, runner.device),
        storage=open_storage(settings),
    )


def create_app(engine: Engine) -> FastAPI:
    """The engine's HTTP application; `engine` is started and stopped with it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start(asyncio.get_running_loop(), lambda: app.state.on_fatal())
        yield
        await asyncio.to_thread(engine.stop)

    app = FastAPI(title="lorry engine", lifespan=lifespan, redirect_slashes=False)
    app.state.on_fatal = lambda: None
    app.add_exception_handler(LorryError, _render)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.state.shutdown = Shutdown()
    app.add_middleware(OpenRequests, shutdown=app.state.shutdown)
    app.add_middleware(RequestLog)

    @app.get("/health")
    def health() -> Response:
        # Asleep it is healthy: a supervisor that took it for dead would undo what the worker asked for.
        ok, wakes_in = engine.fatal is None and not engine.draining, engine.sleep.wakes_in()
        status = "stopping" if not ok else "ok" if wakes_in is None else "asleep"
        return JSONResponse({"status": status, "wakes_in_seconds": wakes_in}, 200 if ok else 503)

    @app.get("/metrics")
    def metrics() -> Response:
        engine.metrics.adapters_loaded.set(len(engine.adapters.held()))
        return Response(generate_latest(engine.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": handlers.model_cards(engine)}

    @app.post("/v1/load_lora_adapter")
    def load_lora_adapter(body: LoadLoraAdapter) -> Response:
        if body.lora_name == engine.runner.name:
            raise Invalid("lora_name: is the base's name", param="lora_name")
        engine.adapters.load(body.lora_name, body.lora_path, body.pinned)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @app.post("/v1/unload_lora_adapter")
    def unload_lora_adapter(body: UnloadLoraAdapter) -> Response:
        engine.adapters.unload(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    @app.post("/v1/sleep")
    async def sleep(body: SleepBody) -> dict[str, bool]:
        """Answers once the memory has been given up (`asleep`), or the lease has ended before that."""
        grace, expected = body.grace_seconds, body.expected_seconds
        asleep = await engine.sleep.ask(body.owner, body.lease_seconds, grace=grace, expected=expected)
        return {"asleep": asleep}

    @app.post("/v1/wake")
    def wake(body: WakeBody) -> dict[str, int | None]:
        """End the owner's lease. The engine wakes up if it was the last one, in the seconds after."""
        engine.sleep.wake(body.owner)
        return {"wakes_in_seconds": engine.sleep.wakes_in()}

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        job = await handlers.prepare_completion(engine, body)
        writer = CompletionWriter(job.id, body.model, with_token_ids=bool(body.return_token_ids))
        return await handlers.respond(engine, job, writer, body, request)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
        job = await handlers.prepare_chat(engine, body)
        writer = ChatWriter(
            job.id, body.model, top_logprobs=body.top_logprobs or 0, with_token_ids=bool(body.return_token_ids)
        )
        return await handlers.respond(engine, job, writer, body, request)

    return app


async def _render(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, LorryError)
    return JSONResponse(error.body(), error.status, headers=error.headers)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"][1:])
    message = first["msg"].removeprefix("Value error, ")
    found = Invalid(f"{path}: {message}" if path else message, param=path or message.partition(":")[0] or None)
    return JSONResponse(found.body(), found.status)


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    body = {
        "error": {
            "type": "invalid_request_error",
            "message": str(error.detail),
            "param": None,
            "code": "not_found" if error.status_code == 404 else "bad_request",
        }
    }
    return JSONResponse(body, error.status_code)


def engine_server(app: FastAPI, engine: Engine, settings: Settings, **config: Any) -> Server:
    """uvicorn with the engine's way of ending; `config` is uvicorn's."""

    shutdown: Shutdown = app.state.shutdown

    def begin() -> None:
        engine.draining = True

    def end() -> None:
        shutdown.over = True
        engine.fail_open(shutting_down())

    server = Server(
        app,
        grace=min(GRACE_SECONDS, settings.shutdown_seconds),
        stalled=settings.slow_reader_seconds,
        begin=begin,
        end=end,
        hard=_HARD,
        **config,
    )

    def fatal() -> None:
        server.should_exit = True

    app.state.on_fatal = fatal
    return server


def run(engine: Engine, settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT (returns 0) or until the engine fails (returns 1)."""
    server = engine_server(create_app(engine), engine, settings)
    serve(server, settings.engine_host, settings.engine_port, variable="LORRY_ENGINE_PORT")
    return 0 if server.started and engine.fatal is None else 1


def main() -> None:
    """The process: load the base model, serve, exit."""
    settings = get_settings()
    configure(settings, "engine")
    sys.exit(run(build_engine(settings), settings))


if __name__ == "__main__":
    main()
