"""The data root: a folder of this machine, or any fsspec URL (s3://bucket/lorry) that several hosts share.

With a URL the local data folder is scratch for what a run is making, and a cache of what was fetched. A thing is stored
whole under a key of its own before a row names it, and never written again: whoever has read the row may copy it. Keys are
relative to the root: files/…, adapters/…, exports/…, jobs/….
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from service.cache import Cache, Listing, remove
from service.errors import Unavailable
from service.settings import Settings

log = logging.getLogger("lorry.storage")
T = TypeVar("T")
_NO_LINKS = (errno.EPERM, errno.EXDEV, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
_FULL = (errno.ENOSPC, errno.EDQUOT)


class StorageUnavailable(Unavailable):
    """The object store does not answer, or refuses. An HTTP request gets 503, a run's attempt fails and is tried again."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code="storage_unavailable")


def open_storage(settings: Settings, patience: float = 0.0) -> Storage:
    """The data root of these settings. `patience`: seconds for which a store that fails is tried again."""
    if settings.storage_url is None:
        return Storage(settings.data_dir)
    return ObjectStorage(settings, patience)


class Storage:
    """A folder of this machine: what is written there is in its place."""

    remote = False

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    def place(self, where: str | Path) -> Path:
        """Where the thing that a row's path, or a key, stands for lies on this machine, if it is there."""
        return self.root / where  # an absolute one stays what it is

    def own_key(self, key: str, run_id: str | None) -> str:
        """The key under which a run stores a thing that each run of its job would make."""
        return key

    def store(self, path: Path, key: str, *, move: bool = True, apart: bool = False) -> str:
        """Make a finished file or folder safe; returns what its row is to say. Raises StorageUnavailable.

        With `move` it is left to the storage, else it stays where it is. `apart`: the files of this folder are fetched
        one by one, never as a whole.
        """
        return str(path)

    def using(self, where: str | Path) -> AbstractContextManager[Path]:
        """A thing on this machine's disk, for as long as the block lasts.

        Raises FileNotFoundError and StorageUnavailable; what a folder holds is not looked at.
        """
        return nullcontext(self.place(where))

    def fetch(self, where: str | Path) -> Path:
        """A thing on this machine's disk, for at least a minute. Raises as `using`."""
        with self.using(where) as path:
            return path

    def copy(self, where: str | Path, target: Path) -> None:
        """Copy a folder to a place outside the cache, whole or not at all. Raises as `using`."""
        staging = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        shutil.rmtree(staging, ignore_errors=True)
        with self.using(where) as path:
            shutil.copytree(path, staging, copy_function=_link_or_copy)
        os.replace(staging, target)

    def pin(self, where: str | Path, target: Path) -> Path:
        """A file that stays whatever becomes of the thing, at `target`, or where it is if it cannot be linked to.

        Raises FileNotFoundError and StorageUnavailable.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            os.link(self.place(where), target)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            return self.place(where)
        return target

    def read(self, where: str | Path, last: int | None = None) -> bytes:
        """A file's bytes, or its `last` ones. Raises FileNotFoundError and StorageUnavailable."""
        with open(self.place(where), "rb") as file:
            if last is not None:
                file.seek(max(0, file.seek(0, os.SEEK_END) - last))
            return file.read()

    def files(self, where: str | Path) -> dict[str, int]:
        """Bytes of each file of a folder by its path below it, or of a file under ''; empty if nothing is there."""
        root = self.place(where)
        found: dict[str, int] = {}
        for path in root.rglob("*") if root.is_dir() else [root]:
            try:
                if path.is_file():
                    found[path.relative_to(root).as_posix() if path != root else ""] = path.stat().st_size
            except OSError:  # gone meanwhile
                continue
        return found

    def names(self, key: str) -> list[str]:
        """What is directly below a folder, sorted; half-made things too."""
        folder = self.place(key)
        return sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []

    def modified(self, where: str | Path) -> float:
        """Unix seconds of the last change of a file or folder; infinity if it is gone."""
        try:
            return self.place(where).stat().st_mtime
        except OSError:
            return float("inf")

    def forget_deleted(self, folder: str) -> None:
        """Let this machine's cache go of what another host has deleted directly below a folder."""

    def remove(self, where: str | Path) -> None:
        """Remove a file or folder, if it is there."""
        remove(self.place(where))

    def address(self, where: str | Path) -> str:
        """What another process is told to find a thing by: see `from_address`."""
        return str(self.place(where))

    def from_address(self, address: str) -> str:
        """The key or path that `address` gave."""
        return address


class ObjectStorage(Storage):
    """A store behind an fsspec URL, with a cache on this machine."""

    remote = True

    def __init__(self, settings: Settings, patience: float) -> None:
        super().__init__(settings.data_dir)
        assert settings.storage_url is not None
        self.url = settings.storage_url.rstrip("/")
        self.patience = patience
        self.cache = Cache(self.root, settings.cache_bytes)
        self.fs, self.base = _open(self.url, settings.storage_options)

    def own_key(self, key: str, run_id: str | None) -> str:
        # A run that was taken for dead may wake up in the middle of storing: it must not mix with its successor's.
        return f"{key}.{(run_id or '')[-8:]}"

    def key(self, where: str | Path) -> str:
        """The key that a row's path, or a place on this machine, stands for. Raises FileNotFoundError for another's."""
        path = Path(where)
        try:
            return (path.relative_to(self.root) if path.is_absolute() else path).as_posix()
        except ValueError:
            raise FileNotFoundError(f"{where} is not in {self.url}") from None

    def store(self, path: Path, key: str, *, move: bool = True, apart: bool = False) -> str:
        sizes = super().files(path)

        def put() -> Listing:
            for name in sizes:
                self.fs.put_file(str(path / name if name else path), self._full(key, name))
            stored = self._listing(key)
            if any(stored.get(name, [-1])[0] != size for name, size in sizes.items()):
                raise OSError(f"{self.url} does not have all of what was stored as {key}")
            return stored

        stored = self._try(put, f"store {key}")
        if move and apart:
            for name, entry in stored.items():
                self.cache.adopt(path / name, f"{key}/{name}", {"": entry})
            shutil.rmtree(path, ignore_errors=True)
        elif move:
            self.cache.adopt(path, key, stored)
        return key

    def using(self, where: str | Path) -> AbstractContextManager[Path]:
        key = self.key(where)

        def listing() -> Listing:
            found = self._try(lambda: self._listing(key), f"look for {key}")
            if not found:
                raise FileNotFoundError(f"{key} is not in {self.url}")
            return found

        def download(names: Iterable[str], target: Path) -> None:
            for name in names:
                path = target / name if name else target
                path.parent.mkdir(parents=True, exist_ok=True)
                self._try(partial(self.fs.get_file, self._full(key, name), str(path)), f"fetch {key}")

        return self.cache.using(key, listing, download)

    def pin(self, where: str | Path, target: Path) -> Path:
        target.parent.mkdir(parents=True, exist_ok=True)
        self._try(partial(self.fs.get_file, self._full(self.key(where)), str(target)), f"fetch {where}")
        return target

    def read(self, where: str | Path, last: int | None = None) -> bytes:
        start = -last if last is not None else None

        def get() -> bytes:
            name = self._full(self.key(where))
            if start is not None and self.fs.size(name) <= -start:
                return bytes(self.fs.cat_file(name))
            return bytes(self.fs.cat_file(name, start=start))

        return self._try(get, f"read {where}")

    def files(self, where: str | Path) -> dict[str, int]:
        key = self.key(where)
        return {name: size for name, (size, _) in self._try(lambda: self._listing(key), f"list {key}").items()}

    def names(self, key: str) -> list[str]:
        def look() -> list[str]:
            try:
                entries = self.fs.ls(self._full(key), detail=False)
            except FileNotFoundError:
                return []
            return sorted({str(e).rstrip("/").rsplit("/", 1)[-1] for e in entries} - {key.rsplit("/", 1)[-1]})

        return self._try(look, f"list {key}")

    def modified(self, where: str | Path) -> float:
        def look() -> float:
            found = self.fs.find(self._full(self.key(where)), detail=True).values()
            return max((_time(info) for info in found), default=float("inf"))

        return self._try(look, f"look at {where}")

    def remove(self, where: str | Path) -> None:
        try:
            key = self.key(where)
        except FileNotFoundError:  # what an installation with a local folder left in its rows
            return

        def delete() -> None:
            try:
                self.fs.rm(self._full(key), recursive=True)
            except FileNotFoundError:
                return

        self._try(delete, f"remove {key}")
        self.cache.forget(key)

    def forget_deleted(self, folder: str) -> None:
        here = [key for _, _, key in self.cache.notes() if key.startswith(f"{folder}/")]
        there = {f"{folder}/{name}" for name in self.names(folder)} if here else set()
        for key in here:
            if key not in there:
                self.cache.forget(key)

    def address(self, where: str | Path) -> str:
        return f"{self.url}/{self.key(where)}"

    def from_address(self, address: str) -> str:
        return address.removeprefix(f"{self.url}/")

    def _full(self, key: str, name: str = "") -> str:
        return "/".join(part for part in (self.base, key, name) if part)

    def _listing(self, key: str) -> Listing:
        full = self._full(key)
        found = self.fs.find(full, detail=True)
        return {
            str(name)[len(full) :].lstrip("/"): [int(info["size"]), str(info.get("ETag") or _time(info))]
            for name, info in found.items()
            if str(name) == full or str(name).startswith(f"{full}/")
        }

    def _try(self, action: Callable[[], T], what: str) -> T:
        """Raises FileNotFoundError, OSError for a full disk of this machine, and StorageUnavailable for the rest."""
        deadline = time.monotonic() + self.patience
        pause = 0.5
        while True:
            try:
                return action()
            except FileNotFoundError:
                raise
            except Exception as error:  # each store has errors of its own
                if isinstance(error, OSError) and error.errno in _FULL:
                    raise
                if time.monotonic() + pause > deadline:
                    raise StorageUnavailable(
                        f"could not {what} at {self.url}: {type(error).__name__}: {error}"
                    ) from error
                log.warning("could not %s, trying again: %s: %s", what, type(error).__name__, error)
            time.sleep(pause)
            pause = min(2 * pause, 10.0)


def _open(url: str, options: dict[str, Any]) -> tuple[Any, str]:
    """fsspec's file system of a URL and the path of the root in it. Raises SystemExit for a URL that cannot be used."""
    try:
        import fsspec

        # Listings must be of now: other hosts write. Folders of file:// are made as they are needed.
        given = {
            "use_listings_cache": False,
            **({"auto_mkdir": True} if url.startswith(("file:", "local:")) else {}),
            **options,
        }
        fs, path = fsspec.core.url_to_fs(url, **given)
    except (ImportError, ValueError) as error:
        hint = "; for s3:// install lorry[s3]" if url.startswith("s3:") else ""
        raise SystemExit(f"LORRY_DATA_DIR: {url} cannot be used: {error}{hint}") from error
    return fs, str(path).rstrip("/")


def _time(info: dict[str, Any]) -> float:
    value = info.get("LastModified") or info.get("mtime") or info.get("created") or 0.0
    return float(value.timestamp() if hasattr(value, "timestamp") else value)


def _link_or_copy(source: str, target: str) -> str:
    try:
        os.link(source, target)
        return target
    except OSError:
        return str(shutil.copy2(source, target))
