"""Uploads: bytes on disk and a row each. The row comes last and goes first, so that a row always has its bytes."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import time
from pathlib import Path
from typing import BinaryIO

from service.db import Database
from service.errors import Conflict, InsufficientStorage, Invalid, TooLarge, UnsupportedMedia
from service.files import repository
from service.files.checks import EXTENSIONS, Check, check_for
from service.ids import new_id
from service.models import FileRow
from service.settings import Settings
from service.storage import StorageUnavailable, open_storage

_UNFINISHED = ".upload-"
_PURPOSE = re.compile(r"[a-z][a-z_-]{0,39}")


def file_key(row: FileRow) -> str:
    """Where in the data root an upload's bytes are; the suffix is that of the uploaded name, in lower case."""
    return f"files/{row.id}{extension_of(row.filename)}"


def file_path(settings: Settings, row: FileRow) -> Path:
    """Where an upload's bytes are on this machine, if they are there."""
    return settings.data_dir / file_key(row)


def extension_of(filename: str) -> str:
    return Path(filename).suffix.lower()


def drop_unfinished(settings: Settings) -> None:
    """Remove what uploads cut off by a crash left behind."""
    for path in settings.files_dir.glob(f"{_UNFINISHED}*"):
        if path.stat().st_mtime < time.time() - 86400:  # a younger one may belong to another API process
            path.unlink(missing_ok=True)


class Upload:
    """One upload on its way to disk: begin, write…, then either keep or drop."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.id = new_id("file").replace("_", "-", 1)
        self.filename = ""
        self.bytes = 0
        self._sha256 = hashlib.sha256()
        self._path = settings.files_dir / f"{_UNFINISHED}{self.id}"
        self._file: BinaryIO | None = None
        self._check: Check | None = None

    def begin(self, filename: str) -> None:
        """Raises UnsupportedMedia for a format that no job reads, and InsufficientStorage."""
        name = re.sub(r"[\x00-\x1f\x7f]", "", filename.replace("\\", "/").rsplit("/", 1)[-1])[-255:]
        extension = extension_of(name)
        if extension not in EXTENSIONS:
            known = ", ".join(sorted(EXTENSIONS))
            message = f"file: {name!r} is of an unsupported format; uploads are {known}"
            raise UnsupportedMedia(message, param="file", code="unsupported_format")
        self.filename = name
        self._check = check_for(extension)
        try:
            self.settings.files_dir.mkdir(parents=True, exist_ok=True)
            self._file = open(self._path, "wb")  # noqa: SIM115 (closed by keep or drop)
        except OSError as error:
            raise _storage(error) from error

    def write(self, chunk: bytes) -> None:
        """Raises TooLarge, Invalid (bad content) and InsufficientStorage."""
        if not chunk or self._file is None or self._check is None:
            return
        self.bytes += len(chunk)
        if self.bytes > self.settings.max_upload_bytes:
            raise too_large(self.settings)
        self._check.feed(chunk)
        self._sha256.update(chunk)
        try:
            self._file.write(chunk)
        except OSError as error:
            raise _storage(error) from error

    def keep(self, db: Database, purpose: str) -> FileRow:
        """Make it durable: bytes first, then the row. Raises StorageUnavailable."""
        assert self._file is not None
        assert self._check is not None
        if not _PURPOSE.fullmatch(purpose):
            raise Invalid("purpose: lower-case letters, '-' and '_', at most 40", param="purpose")
        self._check.finish()
        row = FileRow(
            id=self.id,
            filename=self.filename,
            purpose=purpose,
            bytes=self.bytes,
            sha256=self._sha256.hexdigest(),
            created_at=time.time(),
        )
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._path, file_path(self.settings, row))
            sync_folder(self.settings.files_dir)
        except OSError as error:
            raise _storage(error) from error
        storage = open_storage(self.settings)
        try:
            storage.store(file_path(self.settings, row).absolute(), file_key(row))
            with db.write() as session:
                session.add(row)
        except BaseException:
            file_path(self.settings, row).unlink(missing_ok=True)
            with contextlib.suppress(StorageUnavailable):  # `lorry prune` finds it
                storage.remove(file_key(row))
            raise
        return row

    def drop(self) -> None:
        """Leave nothing behind. Does nothing after keep."""
        if self._file is not None:
            try:
                self._file.close()
            except OSError:  # a full disk may refuse the buffered rest
                pass
            self._path.unlink(missing_ok=True)


def too_large(settings: Settings) -> TooLarge:
    return TooLarge(f"file: larger than LORRY_MAX_UPLOAD_BYTES, {settings.max_upload_bytes} bytes", param="file")


def delete(db: Database, settings: Settings, file_id: str) -> None:
    """Raises NotFound, and Conflict (file_in_use) while an unfinished job reads it."""
    with db.write() as session:
        row = repository.require(session, file_id)
        repository.lock(session, file_id)
        job = repository.used_by(session, file_id)
        if job:
            raise Conflict(f"job {job} reads this file; cancel it or wait for its end", code="file_in_use")
        session.delete(row)
    open_storage(settings).remove(file_key(row))


def sync_folder(folder: Path) -> None:
    """Make a rename inside the folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _storage(error: OSError) -> InsufficientStorage:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        raise error
    return InsufficientStorage("the server's disk is full")
