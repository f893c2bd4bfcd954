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
from service.logs import REQUEST_ID_HEADER, serving

log = logging.getLogger("lorry.api")
access = logging.getLogger("lorry.access")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/=+-]{1,128}")
_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300)
_LONGEST = 500  # bytes of a path that a log line shows
_QUIET = frozenset({"/healthz", "/readyz", "/health", "/metrics"})  # asked every few seconds, by machines


class RequestLog:
    """The outermost middleware, of the API and of the engine.

    `X-Request-Id` is taken from the request if it is sane, else made up, and always sent back; every line logged
    meanwhile carries it. One line a request goes to `lorry.access`, at INFO, once its answer has ended.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        given = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0

        async def tagged(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id
            await send(message)

        with serving(request_id):
            try:
                await self.app(scope, receive, tagged)
            except Exception:
                log.exception("request %s failed: %s %s", request_id, scope["method"], scope["path"])
                if status:
                    raise  # the answer has begun; only closing the connection can say that it is broken
                error = LorryError(f"internal error; the server's log has the details under request id {request_id}")
                await JSONResponse(error.body(), 500)(scope, receive, tagged)
            finally:
                self.ended(scope, status, time.perf_counter() - started)

    def ended(self, scope: Scope, status: int, seconds: float) -> None:
        """The request's answer, of this status (0: none was begun), took so long."""
        level = logging.DEBUG if scope["path"] in _QUIET else logging.INFO
        if access.isEnabledFor(level):
            # As it was sent, still quoted: a path must not be able to write lines of its own.
            path = scope.get("raw_path", b"")[:_LONGEST].decode("ascii", "backslashreplace")
            method, ms = scope["method"], round(seconds * 1000, 1)
            fields = {"method": method, "path": path, "status": status, "ms": ms}
            access.log(level, "%s %s %d %.1f ms", method, path, status, ms, extra={"fields": fields})


class Telemetry(RequestLog):
    """The API's: with the latencies that /metrics shows."""

    def __init__(self, app: ASGIApp, registry: CollectorRegistry) -> None:
        super().__init__(app)
        self.latency = Histogram(
            "lorry_http_request_seconds",
            "Time from a request to the end of its answer, in seconds.",
            ["method", "route", "status"],
            registry=registry,
            buckets=_BUCKETS,
        )

    def ended(self, scope: Scope, status: int, seconds: float) -> None:
        # The route's template, not the path: a label per job id would grow without bound.
        route = getattr(scope.get("route"), "path", "unmatched")
        self.latency.labels(scope["method"], route, str(status)).observe(seconds)
        super().ended(scope, status, seconds)
