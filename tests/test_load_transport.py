"""The API's connection to the engine, against servers that answer byte by byte, too much, or badly."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import httpx
import pytest

from service.engine_transport import EngineTransport, _Connection
from tests.conftest import free_port

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@asynccontextmanager
async def served(answer: Answer) -> AsyncIterator[httpx.AsyncClient]:
    """A client on a server that reads a request's head and then does what `answer` does."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        try:
            await answer(reader, writer)
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, httpx.AsyncClient(base_url=url, transport=EngineTransport(), timeout=60) as http:
        yield http


@pytest.mark.parametrize(
    ("head", "body", "text"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", b"hello", "hello"),
        (CHUNKED, b"2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n", "hello"),
        (b"HTTP/1.1 503 Busy\r\nRetry-After: 2\r\n\r\n", b"until the end", "until the end"),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", b"", ""),
    ],
)
def test_an_answer_is_read_however_it_is_framed_and_cut(head: bytes, body: bytes, text: str) -> None:
    async def one_by_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for n in range(len(head + body)):
            writer.write((head + body)[n : n + 1])
            await writer.drain()
            await asyncio.sleep(0)

    async def run() -> None:
        async with served(one_by_one) as http:
            answer = await http.get("/")
            assert (answer.status_code, answer.text) == (503 if b"503" in head else 200, text)
            assert answer.headers.get("retry-after") == ("2" if b"503" in head else None)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        (b"", httpx.RemoteProtocolError),
        (b"not HTTP at all\r\n\r\n", httpx.RemoteProtocolError),
        (b"HTTP/1.1 200 OK\r\nContent-Le", httpx.RemoteProtocolError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf", httpx.RemoteProtocolError),
        (CHUNKED + b"4\r\nhalf\r\n", httpx.RemoteProtocolError),
        (CHUNKED + b"4\r\nhalf\r\nno number\r\n", httpx.RemoteProtocolError),
    ],
)
def test_an_answer_that_breaks_off_or_is_none_is_httpx_s_error(sent: bytes, error: type[Exception]) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(sent)

    async def run() -> None:
        async with served(answer) as http:
            with pytest.raises(error):
                await http.get("/")

    asyncio.run(run())


def test_nobody_there_and_nobody_answering_are_told_apart() -> None:
    async def never(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(-1)

    async def run() -> None:
        async with httpx.AsyncClient(transport=EngineTransport()) as http:
            with pytest.raises(httpx.ConnectError):
                await http.get(f"http://127.0.0.1:{free_port()}/")
        async with served(never) as http:
            with pytest.raises(httpx.ReadTimeout):
                await http.get("/", timeout=httpx.Timeout(60, read=0.2))

    asyncio.run(run())


def test_what_nobody_fetches_is_held_up_at_the_server_and_a_closed_answer_ends_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    connections: list[_Connection] = []
    made = _Connection.connection_made
    monkeypatch.setattr(_Connection, "connection_made", lambda self, t: (connections.append(self), made(self, t))[1])
    piece = b"x" * 65536
    pieces = 512

    async def run() -> None:
        over = asyncio.Event()
        written = 0

        async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal written
            try:
                writer.write(CHUNKED)
                for _ in range(pieces):
                    writer.write(b"10000\r\n" + piece + b"\r\n")
                    await writer.drain()
                    written += 1
                writer.write(b"0\r\n\r\n")
            finally:
                over.set()

        async with served(flood) as http:
            async with http.stream("GET", "/") as answer:
                while not connections[0]._paused:
                    await asyncio.sleep(0.01)
                assert connections[0]._size < 1024 * 1024
                assert written < pieces
                assert len(b"".join([p async for p in answer.aiter_bytes()])) == pieces * len(piece)
            over.clear()
            async with http.stream("GET", "/"):
                pass
            await asyncio.wait_for(over.wait(), 60)
            assert written < 2 * pieces

    asyncio.run(run())
