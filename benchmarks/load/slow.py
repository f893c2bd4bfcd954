"""Clients that ask and do not read, beside one that does."""

from __future__ import annotations

import asyncio
import json
import socket
import time

import httpx

from benchmarks import common
from benchmarks.load import followers, parts, streams, upload
from service.db import Database
from service.jobs import repository

PATIENCE = 5.0  # LORRY_SLOW_READER_SECONDS here
_EVENT = 16 * 1024  # bytes of a log line
_EVENTS = 200  # about 3 MB: no client's socket takes that unread


def lazy(url: str, method: str, path: str, body: bytes = b"") -> socket.socket:
    """A client that sends its request and reads nothing."""
    host, _, port = url.removeprefix("http://").partition(":")
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect((host, int(port)))
    head = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return sock


def gone(sock: socket.socket) -> bool:
    """Whether the server has dropped the connection; reads nothing."""
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) != b"\x01"  # 1: established


def write(db: Database, job_id: str) -> None:
    for _ in range(_EVENTS // 20):
        with db.write() as session:
            for _ in range(20):
                repository.add_event(session, job_id, "log", {"message": "x" * _EVENT})


async def watch(url: str, db: Database, job_id: str, run_id: str, seconds: float) -> list[float]:
    """Seconds from an event to a follower that reads, one event each 100 ms."""
    follower = followers.Follower()
    task = asyncio.create_task(follower.follow(url, job_id))
    written: dict[int, float] = {}
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        await asyncio.sleep(0.1)
        seq, at = await asyncio.to_thread(followers.add_event, db, job_id, run_id, len(written))
        written[seq] = at
    await asyncio.sleep(1)
    task.cancel()
    await asyncio.wait([task])
    return [at - written[n] for n, at in zip(follower.seen, follower.at, strict=True) if n in written]


def measure(report: common.Report, clients: int = 200) -> None:
    with common.folder() as where:
        base = parts.tiny_base(where)
        patience = {"slow_reader_seconds": str(PATIENCE)}
        with (
            common.database("sqlite", where) as database_url,
            common.queue_server(where) as redis_url,
            parts.engine(where, base, **patience) as engine,
            parts.api(
                where, database_url, redis_url, engine_url=engine.url, base_model=str(base),
                heartbeat_timeout_seconds="600", **patience,
            ) as api,
        ):  # fmt: skip
            db = Database(database_url)
            job_id, _ = followers.make_running_job(db, api.url)
            other, run_id = followers.make_running_job(db, api.url, 1)
            file_id, _, _ = asyncio.run(upload.send(api.url, 8 * parts.MIB))
            name = httpx.get(f"{engine.url}/v1/models", trust_env=False).json()["data"][0]["id"]
            chat = {"model": name, "messages": [{"role": "user", "content": "x"}], "stream": True, "n": 4}
            chat |= {"max_tokens": 200, "ignore_eos": True, "logprobs": True, "top_logprobs": 20}
            write(db, job_id)
            before = asyncio.run(watch(api.url, db, other, run_id, 5))
            api.mark()
            engine.mark()
            began = time.monotonic()
            kinds = {
                "follow": [lazy(api.url, "GET", f"/v1/jobs/{job_id}/events") for _ in range(clients)],
                "download": [lazy(api.url, "GET", f"/v1/files/{file_id}/content") for _ in range(clients // 4)],
                "chat": [lazy(api.url, "POST", "/v1/chat/completions", json.dumps(chat).encode()) for _ in range(16)],
            }
            during = asyncio.run(watch(api.url, db, other, run_id, 3 * PATIENCE))
            ended: dict[str, float] = {}
            deadline = time.monotonic() + 60
            while len(ended) < len(kinds) and time.monotonic() < deadline:
                for kind, socks in kinds.items():
                    if kind not in ended and all(map(gone, socks)):
                        ended[kind] = time.monotonic() - began
                time.sleep(0.2)
            case = {"part": "slow", "case": f"{clients} followers, {clients // 4} downloads, 16 chats unread"}
            for kind, socks in kinds.items():
                left = sum(not gone(s) for s in socks)
                report.add(f"{kind}: still connected", left, aim="= 0", met=left == 0, **case)
            report.add("followers the API still serves", int(api.metric("lorry_event_followers")), **case)
            report.add("API memory growth, MiB", api.grown(), aim="< 128", met=api.grown() < 128, **case)
            report.add("engine memory growth, MiB", engine.grown(), aim="< 64", met=engine.grown() < 64, **case)
            for label, late in (("before", before), ("meanwhile", during)):
                figures = {f"event to a reader, {label} {k}": v for k, v in common.milliseconds(late, 50, 99).items()}
                report.add_all(figures, aims={"event to a reader, meanwhile p99_ms": 2000}, **case)
            out = asyncio.run(streams.all_at_once(api.url, 4, 8))
            report.add("generations afterwards", out.finished, aim="= 4", met=out.finished == 4, **case)
            for socks in kinds.values():
                for sock in socks:
                    sock.close()
            db.dispose()
