"""How the API's open requests end when it stops: some seconds to finish, then an answer that says so."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import Unavailable

GRACE_SECONDS = 5.0  # what open requests get to finish


def stopping() -> Unavailable:
    """The error of a request that the stop cuts short. It says nothing of whether the request had its effect."""
    return Unavailable("the API is shutting down: send the request again", retry_after=1, code="shutting_down")


class Shutdown:
    """One app's. Both calls belong to the app's event loop."""

    def __init__(self) -> None:
        self.over = False
        self.requests: set[asyncio.Task[Any]] = set()
        self.on_begin: list[Callable[[], None]] = []

    def begin(self) -> None:
        """No new connection is taken from now on. What can go on elsewhere (followers of jobs) ends at once."""
        for call in self.on_begin:
            call()

    def end(self) -> None:
        """The grace period is over: every request still open is answered now."""
        self.over = True
        for task in tuple(self.requests):
            task.cancel()


class OpenRequests:
    """Middleware that knows the open requests, and answers 503 for one that the end of the grace period cut short.

    A stream that has begun ends itself, see EventStream's farewell.
    """

    def __init__(self, app: ASGIApp, shutdown: Shutdown) -> None:
        self.app = app
        self.shutdown = shutdown

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        task = asyncio.current_task()
        assert task is not None
        self.shutdown.requests.add(task)
        try:
            if self.shutdown.over:
                raise asyncio.CancelledError
            await self.app(scope, receive, watched)
        except asyncio.CancelledError:
            if not self.shutdown.over:
                raise
            task.uncancel()
            if not started:
                error = stopping()
                answer = JSONResponse(error.body(), error.status, headers={**error.headers, "Connection": "close"})
                await answer(scope, receive, send)
        finally:
            self.shutdown.requests.discard(task)
