"""A bound on the bodies of all calls but the upload, which bounds its own."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY = 32 * 1024 * 1024  # bytes of JSON; they are held in memory
_DRAIN = 64 * 1024 * 1024


class BodyLimit:
    """Answers 413 once a body is larger than MAX_BODY."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == "/v1/files":
            await self.app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        over = declared.isdecimal() and int(declared) > MAX_BODY
        seen = 0

        async def bounded() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if over or seen > MAX_BODY:
                await _drain(message, receive)
                # Starlette's exception, since FastAPI turns any other raised while a body is read into a 400.
                raise HTTPException(413, f"the body is larger than {MAX_BODY} bytes")
            return message

        await self.app(scope, bounded, send)


async def _drain(message: Message, receive: Receive) -> None:
    """Read on for a while: a client that is still sending would not see the answer otherwise."""
    left = _DRAIN
    while message["type"] == "http.request" and message.get("more_body") and left > 0:
        message = await receive()
        left -= len(message.get("body", b""))
