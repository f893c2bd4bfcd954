"""/v1/files: uploads, in OpenAI's File shape."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from service.deps import DbDep, SettingsDep
from service.errors import BadRequest, Invalid, RequestTimeout
from service.files import repository, service
from service.files.download import Download
from service.files.form import read_form
from service.models import FileRow
from service.storage import open_storage
from service.wire import After, Deleted, Limit, Page

router = APIRouter(prefix="/v1/files", tags=["files"])
FileId = Annotated[str, Path(description="Id of an upload, file-….")]
_FORM = 64 * 1024  # bytes a form may take beside its file
_DRAIN = 16 * 1024 * 1024


class File(BaseModel):
    id: str = Field(description="file-…, for dataset.file_id.")
    object: Literal["file"] = Field("file", description="Always 'file'.")
    bytes: int = Field(description="Size, in bytes.")
    created_at: int = Field(description="When it was uploaded, in Unix seconds.")
    filename: str = Field(description="Its name at upload; the extension names the format.")
    purpose: str = Field(description="As given at upload.")
    status: Literal["processed"] = Field("processed", description="Always 'processed': a listed file is complete.")
    sha256: str = Field(description="SHA-256 of the bytes, in hex.")


def wire(row: FileRow) -> File:
    return File(
        id=row.id,
        bytes=row.bytes,
        created_at=int(row.created_at),
        filename=row.filename,
        purpose=row.purpose,
        sha256=row.sha256,
    )


_UPLOAD: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {
                        "file": {
                            "type": "string",
                            "format": "binary",
                            "description": "The file: .jsonl, .json, .csv, .parquet or .txt; text is UTF-8.",
                        },
                        "purpose": {"type": "string", "default": "fine-tune", "description": "A label, kept as given."},
                    },
                }
            }
        },
    }
}


@router.post("", response_model=File, openapi_extra=_UPLOAD, summary="Upload a file")
async def create(request: Request, db: DbDep, settings: SettingsDep) -> File:
    """Stream a file to disk. 408 if its client stops sending, 413 over LORRY_MAX_UPLOAD_BYTES, 415 for another format,
    422 for broken content."""
    stream = _lively(request.stream(), settings.slow_reader_seconds)
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > settings.max_upload_bytes + _FORM:
        await _drain(stream)
        raise service.too_large(settings)
    upload = service.Upload(settings)
    try:
        fields = await read_form(request.headers.get("content-type", ""), stream, upload, run_in_threadpool)
        unknown = sorted(fields.keys() - {"purpose"})
        if unknown:
            raise Invalid(f"{unknown[0]}: unknown field", param=unknown[0], code="unknown_field")
        row = await run_in_threadpool(upload.keep, db, fields.get("purpose", "fine-tune"))
    except RequestTimeout:
        raise
    except ClientDisconnect as error:
        raise BadRequest("the client left before the upload's end") from error
    except Exception:
        await _drain(stream)
        raise
    finally:
        await run_in_threadpool(upload.drop)
    return wire(row)


async def _lively(stream: AsyncIterator[bytes], seconds: float) -> AsyncIterator[bytes]:
    """The stream, as long as something comes at least every so often. Raises RequestTimeout."""
    while True:
        try:
            async with asyncio.timeout(seconds):
                chunk = await anext(stream)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise RequestTimeout(f"nothing came for {seconds:g} s; send the upload again") from None
        yield chunk


async def _drain(stream: AsyncIterator[bytes]) -> None:
    """Read on for a while after a refusal: a client that is still sending would not see the answer otherwise."""
    left = _DRAIN
    try:
        async for chunk in stream:
            left -= len(chunk)
            if left < 0:
                return
    except (ClientDisconnect, RequestTimeout, RuntimeError):  # RuntimeError: the stream was read to its end before
        return


@router.get("", response_model=Page[File], summary="List uploads")
def index(
    db: DbDep,
    limit: Limit = 20,
    after: After = None,
    purpose: Annotated[
        str | None, Query(pattern="^[a-z_-]{1,40}$", description="Only those with this purpose.")
    ] = None,
) -> Page[File]:
    with db.read() as session:
        rows, more = repository.list_page(session, purpose=purpose, limit=limit, after=after)
    return Page(data=[wire(r) for r in rows], has_more=more, next=rows[-1].id if more else None)


@router.get("/{file_id}", response_model=File, summary="One upload")
def show(file_id: FileId, db: DbDep) -> File:
    with db.read() as session:
        return wire(repository.require(session, file_id))


@router.delete("/{file_id}", response_model=Deleted, summary="Delete an upload")
def delete(file_id: FileId, db: DbDep, settings: SettingsDep) -> Deleted:
    """409 while an unfinished job reads it."""
    service.delete(db, settings, file_id)
    return Deleted(id=file_id, object="file")


@router.head("/{file_id}/content", include_in_schema=False)
@router.get("/{file_id}/content", summary="The bytes of an upload", response_class=Response)
def content(file_id: FileId, db: DbDep, settings: SettingsDep) -> Download:
    """Understands Range and If-Range; the ETag is the SHA-256."""
    with db.read() as session:
        row = repository.require(session, file_id)
    return Download.of(open_storage(settings), service.file_key(row), filename=row.filename, sha256=row.sha256)
