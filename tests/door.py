"""A TCP port in front of a server, which dies as a host or a process does, and comes back."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any


class Door:
    """Passes bytes on. `shut`: connections are reset and new ones refused, as after kill -9. `hold`: connections stay and
    new ones are taken, but nothing passes, as with a process that is stopped."""

    def __init__(self, url: str) -> None:
        self._host, _, port = url.removeprefix("http://").partition(":")
        self._behind = int(port)
        # Keeps the port while nothing listens there.
        self._place = socket.socket()
        self._place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._place.bind((self._host, 0))
        self._port: int = self._place.getsockname()[1]
        self.url = f"http://{self._host}:{self._port}"
        self.name = f"{self._host}:{self._port}"
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._passing = asyncio.Event()
        self._passing.set()
        self._server: asyncio.Server | None = None
        self._pairs: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()
        self.open()

    def open(self) -> None:
        """Everything passes."""
        self._run(self._open())

    def shut(self) -> None:
        self._run(self._shut())

    def hold(self) -> None:
        self._loop.call_soon_threadsafe(self._passing.clear)

    def close(self) -> None:
        self.shut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._place.close()

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    async def _open(self) -> None:
        self._passing.set()
        if self._server is None:
            self._server = await asyncio.start_server(self._connected, self._host, self._port, reuse_address=True)

    async def _shut(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for front, back in list(self._pairs):
            sock = front.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, not an end
            front.transport.abort()
            back.transport.abort()
        self._passing.set()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        behind, back = await asyncio.open_connection(self._host, self._behind)
        pair = (writer, back)
        self._pairs.add(pair)
        try:
            await asyncio.gather(self._pass(reader, back), self._pass(behind, writer))
        except OSError:
            pass
        finally:
            self._pairs.discard(pair)
            writer.close()
            back.close()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            await self._passing.wait()
            writer.write(data)
            await writer.drain()
        writer.close()


@contextmanager
def door(url: str) -> Iterator[Door]:
    made = Door(url)
    try:
        yield made
    finally:
        made.close()
