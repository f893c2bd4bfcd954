"""Structural checks of an upload, as its bytes go by. What the rows hold is checked by the job that reads them."""

from __future__ import annotations

import codecs
from typing import Protocol

from service.errors import Invalid

TEXT = frozenset({".jsonl", ".json", ".csv", ".txt"})
EXTENSIONS = TEXT | {".parquet"}


class Check(Protocol):
    def feed(self, chunk: bytes) -> None: ...

    def finish(self) -> None: ...


def check_for(extension: str) -> Check:
    """The check of a format. Its methods raise Invalid (param `file`, code `invalid_file`)."""
    return Utf8() if extension in TEXT else Parquet()


def _bad(message: str) -> Invalid:
    return Invalid(f"file: {message}", param="file", code="invalid_file")


class Utf8:
    """Text is UTF-8, and there is some."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._seen = 0  # bytes
        self._lines = 0
        self._blank = True

    def feed(self, chunk: bytes) -> None:
        self._decode(chunk, final=False)
        self._seen += len(chunk)

    def finish(self) -> None:
        self._decode(b"", final=True)
        if self._blank:
            raise _bad("is empty")

    def _decode(self, chunk: bytes, *, final: bool) -> None:
        kept = len(self._decoder.getstate()[0])  # the start of a character whose end is still to come
        try:
            text = self._decoder.decode(chunk, final)
        except UnicodeDecodeError as error:
            line = self._lines + error.object.count(b"\n", 0, error.start) + 1
            offset = self._seen - kept + error.start
            raise _bad(f"is not UTF-8: {error.reason} at byte {offset}, line {line}") from error
        self._lines += chunk.count(b"\n")
        self._blank = self._blank and not text.strip("\ufeff \t\r\n")


class Parquet:
    """A parquet file has its magic bytes at both ends and, before the last of them, its footer's length."""

    def __init__(self) -> None:
        self._size = 0
        self._head = b""
        self._tail = b""

    def feed(self, chunk: bytes) -> None:
        self._size += len(chunk)
        if len(self._head) < 4:
            self._head = (self._head + chunk[:4])[:4]
            if len(self._head) == 4 and self._head != b"PAR1":
                raise _bad("is not parquet: it does not begin with PAR1")
        self._tail = (self._tail + chunk[-8:])[-8:]

    def finish(self) -> None:
        if self._size == 0:
            raise _bad("is empty")
        footer = int.from_bytes(self._tail[:4], "little")
        if self._size < 12 or self._tail[4:] != b"PAR1" or footer + 12 > self._size:
            raise _bad(f"is truncated parquet: its {self._size} bytes do not end with a footer and PAR1")
