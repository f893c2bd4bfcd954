"""1 GB up and down."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time

from benchmarks import common
from benchmarks.load import parts

_LINE = b'{"text": "' + b"the quick brown fox jumps over the lazy dog " * 5 + b'"}\n'
_CHUNK = _LINE * (256 * 1024 // len(_LINE))
_HEAD = b'--b\r\nContent-Disposition: form-data; name="file"; filename="big.jsonl"\r\n\r\n'
_TAIL = b"\r\n--b--\r\n"


async def send(url: str, size: int) -> tuple[str, str, int]:
    """Upload `size` bytes, about; (file's id, SHA-256, bytes)."""
    chunks = size // len(_CHUNK)
    host, _, port = url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    length = len(_HEAD) + chunks * len(_CHUNK) + len(_TAIL)
    head = f"POST /v1/files HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Length: {length}\r\n"
    writer.write(f"{head}Content-Type: multipart/form-data; boundary=b\r\n\r\n".encode() + _HEAD)
    digest = hashlib.sha256()
    for _ in range(chunks):
        writer.write(_CHUNK)
        digest.update(_CHUNK)
        await writer.drain()
    writer.write(_TAIL)
    answer = await reader.read(-1)
    writer.close()
    status, _, body = answer.partition(b"\r\n\r\n")
    assert b" 200 " in status[:20], answer
    made = json.loads(body)
    assert made["sha256"] == digest.hexdigest()
    return made["id"], made["sha256"], made["bytes"]


async def fetch(url: str, file_id: str) -> tuple[str, int]:
    """(SHA-256, bytes) of a file's content."""
    connection = await parts.Connection.open(url, "GET", f"/v1/files/{file_id}/content")
    assert await connection.begin() == 200
    digest, number = hashlib.sha256(), 0
    async for piece in connection.pieces():
        digest.update(piece)
        number += len(piece)
    connection.close()
    return digest.hexdigest(), number


def measure(report: common.Report, size: int = 1024 * parts.MIB) -> None:
    with (
        common.folder() as where,
        common.database("sqlite", where) as database_url,
        common.queue_server(where) as redis_url,
        parts.api(where, database_url, redis_url) as api,
    ):
        asyncio.run(send(api.url, len(_CHUNK)))  # code paths touched
        case = {"part": "upload", "case": f"{size // parts.MIB} MiB"}
        api.mark()
        began = time.monotonic()
        file_id, sha256, number = asyncio.run(send(api.url, size))
        seconds = time.monotonic() - began
        report.add("up, MiB/s", round(number / parts.MIB / seconds, 1), **case)
        report.add("up, processor time, s", round(api.spent(), 2), **case)
        report.add("up, API memory growth, MiB", api.grown(), aim="< 32", met=api.grown() < 32, **case)
        api.mark()
        began = time.monotonic()
        back = asyncio.run(fetch(api.url, file_id))
        seconds = time.monotonic() - began
        report.add(
            "down, the same bytes", int(back == (sha256, number)), aim="= 1", met=back == (sha256, number), **case
        )
        report.add("down, MiB/s", round(number / parts.MIB / seconds, 1), **case)
        report.add("down, processor time, s", round(api.spent(), 2), **case)
        report.add("down, API memory growth, MiB", api.grown(), aim="< 32", met=api.grown() < 32, **case)
