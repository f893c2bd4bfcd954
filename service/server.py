"""uvicorn as lorry's processes run it: a stop takes a bounded time, and a client that does not read is cut off."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import resource
import socket
import struct
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from service.settings import Settings
from service.shutdown import GRACE_SECONDS, Shutdown

log = logging.getLogger("lorry.server")
_AFTER_GRACE = 2  # seconds for the last answers, then uvicorn cancels what is left
_HARD = 4.0  # seconds after the grace period at which the process is ended, whatever it waits for
_UNSENT = 256 * 1024  # bytes of a connection that the kernel takes beyond what is on its way


class Server(uvicorn.Server):
    """Ends within `grace` + 4 s of a first SIGTERM or SIGINT; a second one cuts the grace period short.

    `begin` is called in the event loop when no connection is taken any more, `end` when the grace period is over: it has
    to end every open request. A connection on which `stalled` seconds passed without its client taking a byte of what
    waits for it is dropped, and its request ends as if the client had left.
    """

    def __init__(
        self,
        app: FastAPI,
        *,
        grace: float,
        stalled: float,
        begin: Callable[[], None],
        end: Callable[[], None],
        hard: float = _HARD,
        **config: Any,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                timeout_graceful_shutdown=math.ceil(grace) + _AFTER_GRACE,
                **config,
            )
        )
        self.grace, self.stalled, self.hard = grace, stalled, hard
        self.cut_off = 0  # connections dropped because nobody read
        self.owns_process = False  # and may end it
        self._begin, self._end = begin, end
        self._over = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: dict[Any, tuple[int, float]] = {}  # connection → (bytes that wait, since when it is that many)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        for sock in sockets or ():
            log.info("listening on %s:%d", *sock.getsockname()[:2])

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._begin()
        timer = asyncio.get_running_loop().call_later(self.grace, self._grace_over)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()

    def _grace_over(self) -> None:
        if not self._over:
            self._over = True
            self._end()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Not uvicorn's, which raises the signal again at the end: a stop that was asked for is no failure.
        if self.should_exit:
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._grace_over)
            return
        self.should_exit = True
        if not self.owns_process:
            return
        watchdog = threading.Timer(self.grace + self.hard, _give_up)
        watchdog.daemon = True
        watchdog.start()

    async def on_tick(self, counter: int) -> bool:
        if counter % 10 == 0:  # once a second
            self._cut_off_stalled(asyncio.get_running_loop().time())
        return await super().on_tick(counter)

    def _cut_off_stalled(self, now: float) -> None:
        waiting: dict[Any, tuple[int, float]] = {}
        for connection in self.server_state.connections:
            size = connection.transport.get_write_buffer_size()
            if size == 0:
                continue
            before, since = self._waiting.get(connection, (-1, now))
            if before != size:
                since = now
            elif now - since >= self.stalled:
                self.cut_off += 1
                log.warning("a client took nothing for %g s and is cut off", self.stalled)
                _reset(connection.transport)
                continue
            waiting[connection] = (size, since)
        self._waiting = waiting


def _reset(transport: asyncio.Transport) -> None:
    """Drop a connection and what waits in it. After a mere close the kernel would keep offering that for minutes."""
    with socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno())) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


def _give_up() -> None:
    log.critical("the stop takes too long (a thread waits for something): ending the process")
    os._exit(1)


def api_server(app: FastAPI, settings: Settings, **config: Any) -> Server:
    """The API's server; `config` is uvicorn's."""
    shutdown: Shutdown = app.state.shutdown
    return Server(
        app,
        grace=min(GRACE_SECONDS, settings.shutdown_seconds),
        stalled=settings.slow_reader_seconds,
        begin=shutdown.begin,
        end=shutdown.end,
        **config,
    )


def listen(host: str, port: int, *, reuse_port: bool = False) -> socket.socket:
    """A bound socket. Raises OSError.

    With `reuse_port` several processes may listen on one port, each given a share of the new connections.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):
            # Accepted sockets inherit it. By itself the kernel takes up to 4 MiB for a client that does not read.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT)
        sock.bind((host, port))
    except BaseException:
        sock.close()
        raise
    return sock


def serve(server: Server, host: str, port: int, *, reuse_port: bool = False, variable: str = "LORRY_PORT") -> None:
    """Listen and serve until told to stop. Raises SystemExit if the port cannot be listened on."""
    # A connection takes a file descriptor, and the usual soft limit of 1024 is soon reached.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        sock = listen(host, port, reuse_port=reuse_port)
    except OSError as error:
        raise SystemExit(f"lorry: cannot listen on {host}:{port}: {error.strerror}; set {variable}") from None
    server.owns_process = True
    server.run(sockets=[sock])
