"""Bearer authentication, as ASGI middleware: it covers every path, those that do not exist too."""

from __future__ import annotations

import secrets

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import Unauthorized

OPEN_PATHS = frozenset({"/healthz", "/readyz"})


class BearerAuth:
    """Answers 401 to every request without the key, health checks excepted."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self.app = app
        self.api_key = api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._allowed(Headers(scope=scope)):
            await self.app(scope, receive, send)
            return
        error = Unauthorized("this server needs its API key: send 'Authorization: Bearer <key>'")
        response = JSONResponse(error.body(), error.status, headers={"WWW-Authenticate": "Bearer"})
        await response(scope, receive, send)

    def _allowed(self, headers: Headers) -> bool:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        # Headers are decoded as Latin-1; the key may be any text, so compare the bytes that were sent.
        sent = token.strip().encode("latin-1")
        return scheme.lower() == "bearer" and secrets.compare_digest(sent, self.api_key)
