"""A whole export as one tar, made while it is read: where each byte of it lies is known before the first is sent."""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Iterable, Iterator

from starlette.responses import StreamingResponse

from service.errors import NotFound, RangeNotSatisfiable
from service.models import ArtifactRow
from service.storage import Storage

CHUNK = 1024 * 1024
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.ASCII)


class Tar:
    """The bytes of a POSIX (pax) archive of `rows`, files below the key `folder`, each under `name`/ in the archive.

    The same rows, name and `mtime` (Unix seconds) give the same bytes. Raises NotFound (file_gone) if a file is missing
    or not of its length.
    """

    def __init__(self, storage: Storage, folder: str, rows: Iterable[ArtifactRow], *, name: str, mtime: int) -> None:
        self.storage = storage
        self.parts: list[tuple[bytes | str, int]] = []  # bytes, or the key of a file
        present = storage.files(folder)
        digest = hashlib.sha256(f"{name} {mtime}".encode())
        for row in sorted(rows, key=lambda row: row.path):
            if present.get(row.path) != row.bytes:
                raise NotFound(f"the bytes of {row.path!r} are gone from the data folder", code="file_gone")
            info = tarfile.TarInfo(f"{name}/{row.path}")
            info.size, info.mtime, info.mode = row.bytes, mtime, 0o644
            self._add(info.tobuf(tarfile.PAX_FORMAT, "utf-8"))
            self.parts.append((f"{folder}/{row.path}", row.bytes))
            self._add(b"\0" * (-row.bytes % tarfile.BLOCKSIZE))
            digest.update(f"\n{row.path} {row.bytes} {row.sha256}".encode())
        self._add(b"\0" * (2 * tarfile.BLOCKSIZE))
        self._add(b"\0" * (-self.size % tarfile.RECORDSIZE))
        self.etag = f'"{digest.hexdigest()}"'

    def _add(self, data: bytes) -> None:
        self.parts.append((data, len(data)))

    @property
    def size(self) -> int:
        """Bytes of the whole archive."""
        return sum(length for _, length in self.parts)

    def read(self, begin: int, end: int) -> Iterator[bytes]:
        """The bytes [begin, end), holding at most 1 MiB at a time. Raises OSError if a file is no longer what it was."""
        at = 0
        for part, length in self.parts:
            first, last = max(begin - at, 0), min(end - at, length)
            at += length
            if first >= last:
                continue
            if isinstance(part, bytes):
                yield part[first:last]
                continue
            with self.storage.using(part) as path, open(path, "rb") as file:
                file.seek(first)
                while first < last:
                    data = file.read(min(CHUNK, last - first))
                    if not data:
                        raise OSError(f"{part} is shorter than it was when its download began")
                    first += len(data)
                    yield data

    def answer(self, filename: str, *, range: str | None, if_range: str | None, head: bool) -> StreamingResponse:
        """The whole, or what a Range header of one range asks for; others are ignored, as HTTP allows.

        A read that fails breaks the connection off before Content-Length is reached, so that no client takes what it
        has for the whole. Raises RangeNotSatisfiable.
        """
        size = self.size
        span = _span(range, size) if if_range in (None, self.etag) else None
        begin, end = span or (0, size)
        headers = {
            "Content-Length": str(end - begin),
            "Content-Disposition": f'attachment; filename="{filename}"',
            "Accept-Ranges": "bytes",
            "ETag": self.etag,
        }
        if span:
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"
        body: Iterable[bytes] = () if head else self.read(begin, end)
        return StreamingResponse(body, 206 if span else 200, headers, media_type="application/x-tar")


def _span(header: str | None, size: int) -> tuple[int, int] | None:
    """[begin, end) that a Range header asks for; None if it asks for nothing that is understood here."""
    found = _RANGE.fullmatch(header.strip()) if header else None
    if found is None or found[0] == "bytes=-":
        return None
    first, last = found[1], found[2]
    begin = int(first) if first else max(size - int(last), 0)
    end = min(int(last) + 1, size) if first and last else size
    if begin >= size:
        headers = {"Content-Range": f"bytes */{size}"}
        raise RangeNotSatisfiable("Range: beyond the end of the archive", param="Range", headers=headers)
    return (begin, end) if begin < end else None
