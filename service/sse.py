"""Server-sent events as an answer: pings while it is quiet, an end when the client leaves, a last word when cut short."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.disconnect import disconnected

PING = b": ping\n\n"


class EventStream(Response):
    """Sends what `events` yields, which is whole events, encoded.

    After `ping` quiet seconds a comment keeps the connection open. A client that leaves ends `events` at its next await.
    If the answer is cut short (the server stops), `farewell` is sent, so that the client sees an end and its reason
    rather than a broken connection. `cleanup` runs at the end, also where `events` never began.

    A client that does not read holds up `events` once its connection's buffer is full; the server ends such a connection.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        *,
        ping: float | None,
        farewell: bytes = b"",
        cleanup: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._ping = ping
        self._farewell = farewell
        self._cleanup = cleanup
        self._sending = False
        self._sent = False  # whether something was sent since the last look

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        body = asyncio.ensure_future(self._send_all(send))
        gone = asyncio.ensure_future(disconnected(receive))
        try:
            while not body.done() and not gone.done():
                await asyncio.wait((body, gone), timeout=self._ping, return_when=asyncio.FIRST_COMPLETED)
                if not (self._sending or self._sent or body.done() or gone.done()):
                    await send({"type": "http.response.body", "body": PING, "more_body": True})
                self._sent = False
            if body.done():
                body.result()
        except asyncio.CancelledError:
            held_up = self._sending
            if not body.done() and not gone.done():
                await _end(body)
                if not held_up:  # else the client does not read, and would hold this up as well
                    await send({"type": "http.response.body", "body": self._farewell, "more_body": False})
            raise
        finally:
            await _end(body, gone)
            if self._cleanup is not None:
                await self._cleanup()

    async def _send_all(self, send: Send) -> None:
        async with aclosing(self._events):
            async for chunk in self._events:
                self._sending = True
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
                self._sending, self._sent = False, True
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _end(*tasks: asyncio.Future[None]) -> None:
    """Cancel what still runs and wait for it: what it has open is closed before we leave."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
