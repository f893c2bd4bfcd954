"""Around every request: its id, its latency, its log line, and an answer when something unforeseen is raised."""

from __future__ import annotations

import logging
import re
import secrets
import time

from prometheus_client import CollectorRegistry, Histogram
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import LorryError

log = logging.getLogger("lorry.api")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/=+-]{1,128}")
_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300)


class Telemetry:
    """The outermost middleware. `X-Request-Id` is taken from the request if it is sane, and always sent back."""

    def __init__(self, app: ASGIApp, registry: CollectorRegistry) -> None:
        self.app = app
        self.latency = Histogram(
            "lorry_http_request_seconds",
            "Time from a request to the end of its answer, in seconds.",
            ["method", "route", "status"],
            registry=registry,
            buckets=_BUCKETS,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0

        async def tagged(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            await self.app(scope, receive, tagged)
        except Exception:
            log.exception("request %s failed: %s %s", request_id, scope["method"], scope["path"])
            if status:
                raise  # the answer has begun; only closing the connection can say that it is broken
            error = LorryError(f"internal error; the server's log has the details under request id {request_id}")
            await JSONResponse(error.body(), 500)(scope, receive, tagged)
        finally:
            seconds = time.perf_counter() - started
            # The route's template, not the path: a label per job id would grow without bound.
            route = getattr(scope.get("route"), "path", "unmatched")
            self.latency.labels(scope["method"], route, str(status)).observe(seconds)
            log.debug("%s %s %s %d %.1f ms", request_id, scope["method"], scope["path"], status, seconds * 1000)
