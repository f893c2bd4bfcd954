"""multipart/form-data read as it arrives: the file part goes to a sink chunk by chunk, the small fields are kept.

Starlette's own parser spools the whole upload to a temporary file first, without a limit on its size, and has it
copied afterwards; here a body over the limit is refused while it is being read.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Protocol

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from service.errors import BadRequest, Invalid, UnsupportedMedia

_MAX_FIELD = 64 * 1024  # bytes of a field that is not the file
_MAX_FIELDS = 20
_WRITE = 1024 * 1024  # bytes gathered before one write


class Sink(Protocol):
    """Where the file part goes. Any method may raise a LorryError to refuse it."""

    def begin(self, filename: str) -> None: ...

    def write(self, chunk: bytes) -> None: ...


async def read_form(
    content_type: str,
    stream: AsyncIterator[bytes],
    sink: Sink,
    in_thread: Callable[[Callable[[bytes], None], bytes], Awaitable[None]],
) -> dict[str, str]:
    """Read a form whose part `file` goes to `sink`; returns the other fields. `in_thread` runs the sink's writes.

    Raises UnsupportedMedia if it is no multipart form, BadRequest if it is broken, Invalid if `file` is missing.
    """
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise UnsupportedMedia(f"Content-Type is {content_type or 'missing'}; an upload is multipart/form-data")
    parts = _Parts(sink)
    try:
        parser = MultipartParser(boundary, parts.callbacks())  # type: ignore[arg-type]
        async for chunk in stream:
            parser.write(chunk)
            if len(parts.pending) >= _WRITE:
                await in_thread(sink.write, parts.take())
        await in_thread(sink.write, parts.take())
        parser.finalize()
    except (MultipartParseError, UnicodeDecodeError) as error:
        raise BadRequest(f"the multipart body is broken: {error}", code="invalid_multipart") from error
    if not parts.ended:
        raise BadRequest("the multipart body ends early: its closing boundary is missing", code="invalid_multipart")
    if not parts.has_file:
        raise Invalid("file: is required, as a multipart file with a filename", param="file", code="missing_field")
    return parts.fields


class _Parts:
    """The parser's callbacks."""

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self.fields: dict[str, str] = {}
        self.pending = bytearray()
        self.has_file = False
        self.ended = False
        self._header = b""
        self._value = b""
        self._disposition = b""
        self._name = ""
        self._in_file = False
        self._text = bytearray()

    def callbacks(self) -> dict[str, Callable[..., None]]:
        return {
            "on_part_begin": self._part_begin,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_part_data": self._part_data,
            "on_part_end": self._part_end,
            "on_end": self._end,
        }

    def take(self) -> bytes:
        chunk = bytes(self.pending)
        self.pending.clear()
        return chunk

    def _part_begin(self) -> None:
        self._disposition = b""
        self._text.clear()

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header = self._value = b""

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        if b"name" not in options:
            raise BadRequest("a part of the form has no name", code="invalid_multipart")
        self._name = options[b"name"].decode()
        self._in_file = self._name == "file"
        if self._in_file:
            if self.has_file:
                raise Invalid("file: one file an upload", param="file")
            if not options.get(b"filename"):
                raise Invalid("file: needs a filename, whose extension names the format", param="file")
            self.has_file = True
            self.sink.begin(options[b"filename"].decode())
        elif self._name in self.fields or len(self.fields) >= _MAX_FIELDS:
            raise Invalid(f"{self._name}: given twice, or too many fields", param=self._name)

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._in_file:
            self.pending += data[start:end]
            return
        self._text += data[start:end]
        if len(self._text) > _MAX_FIELD:
            raise Invalid(f"{self._name}: too long for a form field", param=self._name)

    def _part_end(self) -> None:
        if not self._in_file:
            self.fields[self._name] = self._text.decode()

    def _end(self) -> None:
        self.ended = True
