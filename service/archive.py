"""Where a backup lies: a folder or a tar file, by its name; whole or not there; every file with its size and SHA-256."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any, Protocol

from service.errors import LorryError
from service.files.service import sync_folder

MANIFEST = "manifest.json"
_CHUNK = 1 << 20


class BackupError(LorryError):
    """A backup that cannot be made, read or restored; the message says why and what to do."""

    status, type, code = 409, "conflict_error", "backup"


class Writer(Protocol):
    files: dict[str, dict[str, Any]]

    def add(self, name: str, source: Path) -> dict[str, Any]:
        """Copy a file's bytes as they are now; returns {bytes, sha256}. Raises FileNotFoundError."""


class _Folder:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.files: dict[str, dict[str, Any]] = {}

    def add(self, name: str, source: Path) -> dict[str, Any]:
        target = self.root / name
        with open(source, "rb") as file:
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(target, "wb") as out:
                size = os.fstat(file.fileno()).st_size
                reader = _Hashing(file)
                while size > 0 and (chunk := reader.read(min(_CHUNK, size))):
                    out.write(chunk)
                    size -= len(chunk)
                out.flush()
                os.fsync(out.fileno())
        self.files[name] = reader.result()
        return self.files[name]

    def finish(self, manifest: bytes) -> None:
        with open(self.root / MANIFEST, "wb") as out:
            out.write(manifest)
            out.flush()
            os.fsync(out.fileno())


class _Tar:
    def __init__(self, tar: tarfile.TarFile) -> None:
        self.tar = tar
        self.files: dict[str, dict[str, Any]] = {}

    def add(self, name: str, source: Path) -> dict[str, Any]:
        with open(source, "rb") as file:
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.mode = os.fstat(file.fileno()).st_size, int(time.time()), 0o600
            reader = _Hashing(file)
            self.tar.addfile(info, reader)
        self.files[name] = reader.result()
        return self.files[name]

    def finish(self, manifest: bytes) -> None:
        info = tarfile.TarInfo(MANIFEST)
        info.size, info.mtime, info.mode = len(manifest), int(time.time()), 0o600
        self.tar.addfile(info, io.BytesIO(manifest))


class _Hashing:
    """What is read through it, counted and hashed."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.bytes, self.digest = file, 0, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        chunk = self.file.read(size)
        self.bytes += len(chunk)
        self.digest.update(chunk)
        return chunk

    def result(self) -> dict[str, Any]:
        return {"bytes": self.bytes, "sha256": self.digest.hexdigest()}


@contextmanager
def writing(target: Path, about: dict[str, Any]) -> Iterator[Writer]:
    """Write a backup beside `target` and rename it there at the end, the manifest last; `about` may grow until then.

    Raises BackupError if there is something at `target`.
    """
    if target.exists():
        raise BackupError(f"{target} exists; a backup never replaces anything: name another place")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    writer: _Folder | _Tar
    try:
        if target.suffix == ".tar":
            descriptor = os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
                    writer = _Tar(tar)
                    yield writer
                    writer.finish(_manifest(about, writer))
                file.flush()
                os.fsync(file.fileno())
        else:
            staging.mkdir(mode=0o700)
            writer = _Folder(staging)
            yield writer
            writer.finish(_manifest(about, writer))
        os.replace(staging, target)
        sync_folder(target.parent)
    finally:
        if staging.is_dir():
            shutil.rmtree(staging, ignore_errors=True)
        else:
            staging.unlink(missing_ok=True)


def _manifest(about: dict[str, Any], writer: Writer) -> bytes:
    files = [{"path": name, **entry} for name, entry in sorted(writer.files.items())]
    return json.dumps({**about, "files": files}, indent=1, ensure_ascii=False).encode()


class Reader:
    """A backup to read from. Raises BackupError for what is none."""

    def __init__(self, source: Path) -> None:
        self.source = source
        self.tar: tarfile.TarFile | None = None
        if not source.exists():
            raise BackupError(f"no backup at {source}")
        try:
            if source.is_file():
                self.tar = tarfile.open(source, "r:")  # noqa: SIM115 (closed by close)
            with self.open(MANIFEST) as file:
                self.manifest: dict[str, Any] = json.load(file)
            self.files: dict[str, dict[str, Any]] = {f["path"]: f for f in self.manifest["files"]}
        except (tarfile.TarError, OSError, KeyError, ValueError, TypeError) as error:
            raise BackupError(f"{source} is no whole backup: its {MANIFEST} cannot be read ({error})") from error
        for name in self.files:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or path.as_posix() != name:
                raise BackupError(f"{source}: {name!r} is no path inside a backup")

    def open(self, name: str) -> IO[bytes]:
        """Raises KeyError or OSError for what is not there."""
        if self.tar is None:
            return open(self.source / name, "rb")
        file = self.tar.extractfile(name)
        if file is None:
            raise KeyError(f"{name} is no file")
        return file

    def copy(self, name: str, target: Path | None) -> None:
        """Copy a file out (or only read it) and check it against the manifest. Raises BackupError."""
        try:
            with self.open(name) as file:
                reader = _Hashing(file)
                if target is None:
                    while reader.read(_CHUNK):
                        pass
                else:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with open(target, "wb") as out:
                        shutil.copyfileobj(reader, out, _CHUNK)
                        out.flush()
                        os.fsync(out.fileno())
        except (KeyError, FileNotFoundError, tarfile.TarError) as error:
            raise BackupError(f"the backup is damaged: {name} is missing from it or cut off") from error
        if reader.result() != {k: self.files[name][k] for k in ("bytes", "sha256")}:
            raise BackupError(f"the backup is damaged: {name} is not what its manifest says")

    def close(self) -> None:
        if self.tar is not None:
            self.tar.close()
