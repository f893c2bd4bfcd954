"""create_app(): lifespan, routers, one error handler."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from prometheus_client import CollectorRegistry
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException

from service import __version__, graphs, health
from service.adapters import endpoints as adapters
from service.auth import BearerAuth
from service.db import Database
from service.engines import Engines
from service.errors import BadRequest, InsufficientStorage, Invalid, LorryError, Unavailable, UnsupportedMedia
from service.files import endpoints as files
from service.fine_tuning import endpoints as fine_tuning
from service.generate import endpoints as generate
from service.jobs import endpoints as jobs
from service.jobs.dry_run import DryRuns
from service.jobs.events import EventHub
from service.limits import BodyLimit
from service.migrate import is_current
from service.openai import endpoints as openai
from service.queue import JobQueue
from service.reconcile import reconcile
from service.retention import prune_forever
from service.settings import Settings, get_settings
from service.shutdown import OpenRequests, Shutdown
from service.telemetry import Telemetry
from service.wire import ErrorBody

log = logging.getLogger("lorry.api")


def create_app(settings: Settings | None = None) -> FastAPI:
    """The HTTP application. Its start fails if the database is not migrated."""
    settings = settings or get_settings()
    registry = CollectorRegistry()
    app = FastAPI(
        title="lorry",
        version=__version__,
        description="Trains LoRA adapters over HTTP and serves them the moment they are trained.",
        lifespan=_lifespan,
        responses={"4XX": {"model": ErrorBody, "description": "The request cannot be served as it is."}},
        redirect_slashes=False,
        # BearerAuth below does the checking, on every path; this only describes it.
        dependencies=[Depends(HTTPBearer(auto_error=False))] if settings.api_key else [],
    )
    app.state.settings = settings
    app.state.registry = registry
    app.state.shutdown = Shutdown()
    app.state.dry_runs = DryRuns(settings)
    for part in (files, jobs, graphs, adapters, generate, openai, fine_tuning, health):
        app.include_router(part.router)
    app.add_exception_handler(LorryError, _render)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(OperationalError, _database_error)
    app.add_exception_handler(PoolTimeout, _database_error)
    app.add_middleware(BodyLimit)
    if settings.api_key:
        app.add_middleware(BearerAuth, api_key=settings.api_key)
    app.add_middleware(OpenRequests, shutdown=app.state.shutdown)
    app.add_middleware(Telemetry, registry=registry)  # added last, so outermost
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    settings: Settings = app.state.settings
    url = settings.sqlalchemy_url
    if not await asyncio.to_thread(is_current, url):
        raise RuntimeError("the database is not at the newest migration: run `lorry migrate`")
    app.state.db = db = Database(url)
    app.state.queue = queue = JobQueue(settings.redis_url, settings.queue)
    app.state.engine = engine = Engines(settings, app.state.registry)
    engine.start()
    collector = health.JobsCollector(app.state.registry, db, queue)
    app.state.events = hub = EventHub(db, app.state.registry)
    app.state.shutdown.on_begin.append(hub.stop)
    chores = [asyncio.create_task(_reconcile_forever(db, queue, settings))]
    if settings.prune_seconds:
        chores.append(asyncio.create_task(prune_forever(db, settings)))
    try:
        yield
    finally:
        for chore in chores:
            chore.cancel()
        await asyncio.gather(*chores, return_exceptions=True)
        app.state.registry.unregister(collector)
        await hub.close()
        await engine.aclose()
        queue.redis.close()
        db.dispose()


async def _reconcile_forever(db: Database, queue: JobQueue, settings: Settings) -> None:
    while True:
        try:
            await asyncio.to_thread(reconcile, db, queue, settings)
        except Exception:  # the database may be away for a while; the next pass tries again
            log.exception("reconcile failed, will try again in %g s", settings.reconcile_seconds)
        await asyncio.sleep(settings.reconcile_seconds)


async def _render(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, LorryError)
    return JSONResponse(error.body(), error.status, headers=error.headers)


async def _database_error(request: Request, error: Exception) -> JSONResponse:
    """The database is away, full, or stays locked: nothing was stored, and trying again may help."""
    log.error("request %s: database: %s", request.state.request_id, error)
    if "disk is full" in str(error) or "No space left" in str(error):
        return await _render(request, InsufficientStorage("the database's disk is full"))
    return await _render(request, Unavailable("the database is out of reach", code="database_unavailable"))


_HTTP = {
    404: ("not_found_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    413: ("invalid_request_error", "too_large"),
}


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    """Starlette's own: unknown path, wrong method, unreadable body."""
    assert isinstance(error, HTTPException)
    kind, code = _HTTP.get(error.status_code, ("invalid_request_error", "bad_request"))
    message = str(error.detail)
    if error.status_code == 404:
        message = f"no such path: {request.url.path}"
    elif error.status_code == 405:
        message = f"{request.method} is not allowed here"
    elif message == "There was an error parsing the body":  # FastAPI's, e.g. for bytes that are not UTF-8
        code, message = "invalid_json", "the body is not JSON in UTF-8, or is nested too deeply"
    body = {"error": {"type": kind, "message": message, "param": None, "code": code}}
    return JSONResponse(body, error.status_code, headers=dict(error.headers or {}))


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    found = validation_error(error, request.headers.get("content-type", ""))
    return JSONResponse(found.body(), found.status)


def validation_error(error: RequestValidationError, content_type: str = "application/json") -> LorryError:
    """The first of pydantic's errors in our shape, with a count of the others."""
    errors = error.errors()
    first = errors[0]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "malformed JSON")
        return BadRequest(f"the body is not JSON: {reason} (at byte {first['loc'][-1]})", code="invalid_json")
    if isinstance(error.body, bytes) and error.body and "json" not in content_type.lower():
        return UnsupportedMedia(f"Content-Type is {content_type or 'missing'}; this call takes application/json")
    param, message = _locate(first, error.body)
    if len(errors) > 1:
        others = ", ".join(dict.fromkeys(p or "body" for p, _ in (_locate(e, error.body) for e in errors[1:])))
        message += f" (and {len(errors) - 1} more: {others})"
    return Invalid(f"{param}: {message}" if param else message, param=param, code=_CODES.get(first["type"]))


_CODES = {"extra_forbidden": "unknown_field", "missing": "missing_field"}
_OWN_PATH = re.compile(r"([a-z_]+(?:\.[a-z_0-9]+)*): (.+)", re.DOTALL)


def _locate(item: Any, body: Any) -> tuple[str | None, str]:
    """(dotted path, message) of one pydantic error.

    pydantic puts the names of union members between field names; what cannot be followed in the body is such a name.
    """
    source, *rest = item["loc"]
    path: list[str] = []
    here = body if source == "body" else None
    for depth, part in enumerate(rest):
        last = depth == len(rest) - 1
        if source != "body":
            path.append(str(part))
        elif isinstance(here, dict):
            if part in here:
                path.append(str(part))
                here = here[part]
            elif last and item["type"] == "missing":
                path.append(str(part))
        elif isinstance(here, list) and isinstance(part, int) and part < len(here):
            path.append(str(part))
            here = here[part]
    message = item["msg"]
    if item["type"] == "extra_forbidden":
        message = "unknown field"
    elif item["type"] == "missing":
        message = "is required" if path else "the body is empty; send JSON"
    elif item["type"] in ("model_attributes_type", "model_type", "dict_type"):
        message = "must be an object" if path else "the body must be a JSON object"
    elif item["type"] in ("union_tag_not_found", "union_tag_invalid"):
        path.append("kind")
    elif item["type"] == "value_error":
        message = message.removeprefix("Value error, ")
        own = _OWN_PATH.fullmatch(message)
        if own:  # the specs' own checks begin with the path below the model that has the check
            path += own[1].split(".")
            message = own[2]
    return ".".join(path) or None, message
