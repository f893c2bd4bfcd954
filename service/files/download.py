"""A file as an answer, with Range and If-Range by its SHA-256."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse
from starlette.types import Message, Receive, Scope, Send

from service.disconnect import ClientGone, unless_gone
from service.errors import BadRequest, LorryError, NotFound, RangeNotSatisfiable
from service.storage import Storage


class Download(FileResponse):
    """Starlette's FileResponse with a content-addressed ETag and errors in this API's shape."""

    def __init__(self, path: Path, *, filename: str, sha256: str) -> None:
        if not path.is_file():
            raise _gone(filename)
        super().__init__(
            path, media_type="application/octet-stream", filename=filename, headers={"ETag": f'"{sha256}"'}
        )

    @classmethod
    def of(cls, storage: Storage, key: str, *, filename: str, sha256: str) -> Download:
        """What the data root has under a key, fetched if it is not here. Raises NotFound and StorageUnavailable."""
        try:
            return cls(storage.fetch(key), filename=filename, sha256=sha256)
        except FileNotFoundError:
            raise _gone(filename) from None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused: LorryError | None = None

        async def watch(message: Message) -> None:
            nonlocal refused
            if message["type"] == "http.response.start" and message["status"] in (400, 416):
                headers = {k.decode(): v.decode() for k, v in message["headers"] if k.lower() == b"content-range"}
                if message["status"] == 416:
                    refused = RangeNotSatisfiable("Range: beyond the end of the file", param="Range", headers=headers)
                else:
                    refused = BadRequest("Range: malformed; e.g. bytes=0-1023", param="Range")
            if refused is None:
                await send(message)

        try:
            await unless_gone(Request(scope, receive), super().__call__(scope, receive, watch))
        except ClientGone:  # the rest of a large file would be read for nobody
            return
        if refused is not None:
            answer = JSONResponse(refused.body(), refused.status, headers=refused.headers)
            await answer(scope, receive, send)


def _gone(filename: str) -> NotFound:
    return NotFound(f"the bytes of {filename!r} are gone from the data folder", code="file_gone")
