"""httpx's transport to the engine over plain HTTP/1.1: a C parser, and a socket for each request.

Of what a token costs in the API most was spent in its client: httpx's own transport parses in Python, chunk by chunk, and
looks through its whole pool for each request. Here what has come by the time the API looks is one piece.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any, cast

import httptools
import httpx

_HIGH = 256 * 1024  # bytes that nobody has fetched, at which reading stops until somebody does


class EngineTransport(httpx.AsyncBaseTransport):
    """Raises httpx's errors. A response that is closed before its end closes its connection."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        timeouts: dict[str, float | None] = request.extensions.get("timeout", {})
        body = await request.aread()
        lines = [b"%s %s HTTP/1.1" % (request.method.encode(), request.url.raw_path)]
        lines += [name + b": " + value for name, value in request.headers.raw if name.lower() != b"connection"]
        loop = asyncio.get_running_loop()
        host, port = request.url.host, request.url.port or 80
        with _mapped(httpx.ConnectTimeout, httpx.ConnectError):
            async with asyncio.timeout(timeouts.get("connect")):
                _, connection = await loop.create_connection(_Connection, host, port)
        try:
            connection.transport.write(b"\r\n".join([*lines, b"Connection: close", b"", b""]) + body)
            with _mapped(httpx.ReadTimeout, httpx.ReadError):
                async with asyncio.timeout(timeouts.get("read")):
                    await connection.head
        except BaseException:
            connection.transport.abort()
            raise
        stream = _Body(connection, timeouts.get("read"))
        abort = {"abort": connection.transport.abort}  # whoever reads sees the connection break
        return httpx.Response(connection.status, headers=connection.headers, stream=stream, extensions=abort)


class _Body(httpx.AsyncByteStream):
    def __init__(self, connection: _Connection, timeout: float | None) -> None:
        self._connection = connection
        self._timeout = timeout

    async def __aiter__(self) -> AsyncIterator[bytes]:
        connection = self._connection
        while True:
            if piece := connection.take():
                yield piece
            elif connection.ended:
                if connection.error is not None:
                    raise connection.error
                return
            else:
                with _mapped(httpx.ReadTimeout, httpx.ReadError):
                    async with asyncio.timeout(self._timeout):
                        await connection.more()

    async def aclose(self) -> None:
        self._connection.transport.abort()


class _Connection(asyncio.Protocol):
    """One request's socket: the parser's callbacks on one side, `head`, `take` and `more` on the other."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.head: asyncio.Future[None] = loop.create_future()
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.ended = False
        self.error: httpx.HTTPError | None = None
        self._parser: Any = httptools.HttpResponseParser(self)
        self._pieces: list[bytes] = []
        self._size = 0
        self._paused = False
        self._waiter: asyncio.Future[None] | None = None

    def take(self) -> bytes:
        """What has come of the body since the last call."""
        piece = b"".join(self._pieces)
        self._pieces.clear()
        self._size = 0
        if self._paused:
            self._paused = False
            self.transport.resume_reading()
        return piece

    async def more(self) -> None:
        """Wait for more of the body, or its end."""
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    # asyncio's calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(httpx.RemoteProtocolError(f"the answer is not HTTP: {error}"))
            self.transport.abort()
            return
        if self._size > _HIGH and not self._paused:
            self._paused = True
            self.transport.pause_reading()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.ended:
            return
        if exc is None and self.head.done() and not self._measured():
            self._end(None)  # a body without a length ends with its connection
        else:
            self._end(httpx.RemoteProtocolError("the server closed the connection before the end of its answer"))

    # httptools' calls

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        if self.status < 200:  # 100 Continue and the like: the answer proper follows
            self.headers.clear()
        elif not self.head.done():
            self.head.set_result(None)

    def on_body(self, body: bytes) -> None:
        self._pieces.append(body)
        self._size += len(body)

    def on_message_complete(self) -> None:
        if self.head.done():
            self._end(None)

    def _measured(self) -> bool:
        return any(name.lower() in (b"content-length", b"transfer-encoding") for name, _ in self.headers)

    def _end(self, error: httpx.HTTPError | None) -> None:
        self.ended, self.error = True, error
        if not self.head.done():
            self.head.set_exception(error or httpx.RemoteProtocolError("no answer"))
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


@contextmanager
def _mapped(timeout: type[httpx.TimeoutException], other: type[httpx.NetworkError]) -> Iterator[None]:
    try:
        yield
    except TimeoutError as error:
        raise timeout(str(error) or "timed out") from error
    except OSError as error:
        raise other(str(error)) from error
