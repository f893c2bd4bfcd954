"""Many clients and slow ones: what each costs is bounded, by counting what is held rather than by the clock."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.load import streams
from service.files import service as files
from service.files.form import read_form
from service.jobs import repository
from service.settings import Settings
from tests.conftest import Api, serve
from tests.serving import EngineServer, engine_settings, serve_engine, until
from tests.steps import cpt, post, start, succeed, unique
from tests.test_shutdown import Client, half_an_upload, read_all

MIB = 1024 * 1024


@pytest.fixture(scope="module")
def engine(tiny_base: Path) -> Iterator[EngineServer]:
    with serve_engine(engine_settings(tiny_base, slow_reader_seconds=2)) as served:
        yield served


@pytest.fixture(scope="module")
def api(engine: EngineServer, sqlite_url: str, make_settings: Callable[..., Settings]) -> Iterator[Api]:
    with serve(make_settings(database_url=sqlite_url, engine_url=engine.url, slow_reader_seconds=2)) as served:
        yield served


def add_logs(api: Api, job_id: str, number: int, size: int = 10) -> None:
    with api.db.write() as session:
        for n in range(number):
            repository.add_event(session, job_id, "log", {"message": f"{n} " + "x" * size})


async def ids_of(url: str, job_id: str) -> list[int]:
    """Ids of a job's events, read from a socket to the stream's end."""
    host, _, port = url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"GET /v1/jobs/{job_id}/events HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    lines = (await asyncio.wait_for(reader.read(-1), 120)).split(b"\n")
    writer.close()
    return [int(line[4:]) for line in lines if line.startswith(b"id: ")]


def test_followers_at_the_same_place_share_one_read_and_one_poller(api: Api) -> None:
    number = 150
    job_id = str(post(api, cpt(unique()))["id"])
    run = start(api, job_id)
    add_logs(api, job_id, 1000)
    hub = api.app.state.events
    gate, read = threading.Event(), hub._read
    hub._read = lambda *args: (gate.wait(60), read(*args))[1]
    reads = hub.reads
    try:

        async def all_of_them() -> list[list[int]]:
            return await asyncio.gather(*(ids_of(api.url, job_id) for _ in range(number)))

        with ThreadPoolExecutor(1) as pool:
            streams = pool.submit(asyncio.run, all_of_them())
            until(lambda: job_id in hub._feeds and hub._feeds[job_id].followers == number)
            assert hub.reads == reads + 1, "one read for all, still under way"
            gate.set()
            succeed(api, job_id, run)
            seen = streams.result(120)
    finally:
        hub._read = read
    assert all(ids == list(range(1, 1005)) for ids in seen)
    until(lambda: not hub._feeds)
    metrics = httpx.get(f"{api.url}/metrics").text
    assert "lorry_event_followers 0.0" in metrics
    assert f"lorry_event_polls_total {float(hub.polls)}" in metrics


def test_more_streams_than_there_is_room_for_are_told_when_to_come_again_and_all_end(
    api: Api, engine: EngineServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = engine.engine.runner.forward
    refused = engine.engine.metrics.refused._value.get
    before = refused()
    # No step ends before one of them has been turned away: 16 run, 64 wait, and there are more.
    monkeypatch.setattr(
        engine.engine.runner, "forward", lambda step: (until(lambda: refused() > before), forward(step))[1]
    )
    clients = 100
    out = asyncio.run(streams.all_at_once(api.url, clients, 16))
    assert (out.finished, out.stuck, out.errors) == (clients, 0, 0)
    assert out.refused > 0
    assert out.blunt == 0, "every 503 says when to come again"
    until(engine.idle)


def test_what_a_feed_keeps_of_long_events_is_bounded_in_bytes(api: Api) -> None:
    job_id = str(post(api, cpt(unique()))["id"])
    run = start(api, job_id)
    hub = api.app.state.events
    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(asyncio.run, ids_of(api.url, job_id))
        until(lambda: job_id in hub._feeds and hub._feeds[job_id].head)
        add_logs(api, job_id, 100, size=100_000)
        until(lambda: job_id in hub._feeds and hub._feeds[job_id].head == 103)
        feed = hub._feeds[job_id]
        assert 0 < sum(len(item.sse) for item in feed.window) == feed.bytes <= MIB
        succeed(api, job_id, run)
        assert stream.result(120) == list(range(1, 105))


def lazy(url: str, request: str, body: bytes = b"") -> socket.socket:
    """A client that sends a request and reads nothing."""
    host, _, port = url.removeprefix("http://").partition(":")
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.settimeout(60)
    sock.connect((host, int(port)))
    head = f"{request} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return sock


def dropped(sock: socket.socket) -> bool:
    """Whether the connection is over, on a client that reads nothing: it was reset, not merely closed."""
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) != b"\x01"  # 1: established


def taken(sock: socket.socket) -> int:
    """Bytes that come until the server's end."""
    number = 0
    try:
        while chunk := sock.recv(65536):
            number += len(chunk)
    except ConnectionResetError:
        pass
    return number


def test_clients_that_read_nothing_are_cut_off_and_hold_up_nobody(api: Api, engine: EngineServer) -> None:
    job_id = str(post(api, cpt(unique()))["id"])
    run = start(api, job_id)
    content = b"line of text\n" * (8 * MIB // 13)
    file = api.http.post("/v1/files", files={"file": ("a.txt", content)}).json()["id"]
    ask = {"model": engine.base, "messages": [{"role": "user", "content": "x"}], "stream": True, "n": 4}
    ask |= {"max_tokens": 200, "ignore_eos": True, "logprobs": True, "top_logprobs": 20}
    body = json.dumps(ask).encode()
    clients = {
        "follower": lazy(api.url, f"GET /v1/jobs/{job_id}/events"),
        "download": lazy(api.url, f"GET /v1/files/{file}/content"),
        "chat": lazy(api.url, "POST /v1/chat/completions", body),
        "engine": lazy(engine.url, "POST /v1/chat/completions", body),
    }
    stuck = half_an_upload(api.url)
    good = Client(api.url)
    seen: list[int] = []
    with ThreadPoolExecutor(1) as pool:
        follower = pool.submit(good.follow, job_id, seen)
        add_logs(api, job_id, 300, size=20_000)
        until(lambda: api.server.cut_off >= 3 and engine.server.cut_off >= 1)
        assert api.http.post("/generate", json={"prompt": "x", "max_new_tokens": 3}).status_code == 200
        succeed(api, job_id, run)
        follower.result(120)
    assert seen == list(range(1, 305))
    assert read_all(stuck).startswith("HTTP/1.1 408 ")
    until(lambda: not list(api.settings.files_dir.glob(".upload-*")))
    until(lambda: all(map(dropped, clients.values())))
    for name, sock in clients.items():
        number = taken(sock)
        sock.close()
        assert number < 2 * MIB, name
    until(lambda: not api.app.state.events._feeds)
    until(engine.idle)
    api.http.close()
    until(lambda: not api.server.server_state.connections)
    until(lambda: not engine.server.server_state.connections)


def test_an_upload_is_read_no_faster_than_it_is_written() -> None:
    """Piece by piece: whatever its size, about a megabyte of it is in memory."""
    total, given, written = 256 * MIB, 0, 0
    held: list[int] = []
    chunk = b"x" * 65535 + b"\n"

    class Sink:
        def begin(self, filename: str) -> None:
            pass

        def write(self, piece: bytes) -> None:
            nonlocal written
            held.append(given - written)
            written += len(piece)

    async def stream() -> AsyncIterator[bytes]:
        nonlocal given
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.txt"\r\n\r\n'
        while given < total:
            given += len(chunk)
            yield chunk
        yield b"\r\n--b--\r\n"

    async def in_thread(function: Callable[[bytes], None], piece: bytes) -> None:
        await asyncio.to_thread(function, piece)

    asyncio.run(read_form("multipart/form-data; boundary=b", stream(), Sink(), in_thread))
    assert written == total
    assert max(held) <= MIB + 2 * len(chunk)


def test_an_upload_over_http_comes_in_pieces_and_leaves_as_it_came(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces: list[int] = []
    write = files.Upload.write

    def counted(self: files.Upload, piece: bytes) -> None:
        pieces.append(len(piece))
        write(self, piece)

    monkeypatch.setattr(files.Upload, "write", counted)
    content = b"0123456789abcde\n" * (24 * MIB // 16)
    with httpx.Client(base_url=api.url, timeout=120) as http:
        made: dict[str, Any] = http.post("/v1/files", files={"file": ("a.txt", content)}).json()
        assert made["bytes"] == len(content) == sum(pieces)
        assert max(pieces) <= 1.5 * MIB
        with http.stream("GET", f"/v1/files/{made['id']}/content") as answer:
            assert b"".join(answer.iter_raw()) == content
