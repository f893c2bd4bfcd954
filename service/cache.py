"""What can be had again, on this machine's disk: whole or not there, and not more than a limit.

That is what was fetched from an object store (`using`), and what is made here for those to come (`reading`, `making`). Each
thing has a note in .cache/: what it was fetched from, how large it is, and by its time when it was last used. The
note is also its lock, shared by those who read the thing and taken by who fetches, makes or removes it; a lock ends with its
process, so a crash leaves none.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, unquote

log = logging.getLogger("lorry.storage")
_NOTES = ".cache"
_STALE = 86400.0  # seconds after which a half-fetched thing is nobody's
_GRACE = 60.0  # seconds after its use in which a thing stays: a file may be opened after it was fetched

Listing = dict[str, list[Any]]  # [bytes, version] of each file by its path below the thing; of a file under ''


class Cache:
    """The things below `root` that may be removed, since they can be had again. Safe with any number of processes.

    `grace`: seconds after its use in which a thing stays, whatever the limit; None is a minute.
    """

    def __init__(self, root: Path, limit: int, grace: float | None = None) -> None:
        self.root, self.limit, self.grace = root, limit, grace

    @contextmanager
    def using(
        self, key: str, listing: Callable[[], Listing], download: Callable[[Iterable[str], Path], None]
    ) -> Iterator[Path]:
        """A thing, fetched if it is not here as `listing` says; it stays for as long as the block lasts."""
        target = self.root / key
        with self._locked(key, fcntl.LOCK_EX) as note:
            try:
                now = listing()
                if not target.exists() or _read(note) != now:
                    self._fetch(target, now, download)
                    _write(note, now)
            except BaseException:
                if _read(note) is None:
                    self._note(key).unlink(missing_ok=True)
                raise
            os.utime(note.fileno())
            fcntl.flock(note, fcntl.LOCK_SH)
            self.shrink()
            yield target
            os.utime(note.fileno())

    @contextmanager
    def reading(self, key: str) -> Iterator[Path]:
        """The place of a thing that `making` may have put there; for as long as the block lasts nobody removes it."""
        with self._locked(key, fcntl.LOCK_SH) as note:
            yield self.root / key
            os.utime(note.fileno())

    @contextmanager
    def making(self, key: str) -> Iterator[tuple[Path, Path]]:
        """A thing's place and another beside it: what was written there by the block's end takes the place, whole.

        Nobody else reads or makes the thing meanwhile, so who comes second finds it there. Raises OSError on entering;
        what goes wrong in taking the place is logged, and the place stays as it was.
        """
        target, staging = self.root / key, self._parts / f"{os.getpid()}-{os.urandom(6).hex()}"
        with self._locked(key, fcntl.LOCK_EX) as note:
            self._parts.mkdir(parents=True, exist_ok=True)
            try:
                yield target, staging
                with _logged(f"{key} could not be kept"):
                    if staging.exists():
                        _write(note, {"": [staging.stat().st_size, ""]})  # first: counted rather twice than never
                        target.parent.mkdir(parents=True, exist_ok=True)
                        os.replace(staging, target)
                    os.utime(note.fileno())
            finally:
                with _logged(f"{staging} could not be removed"):
                    remove(staging)
                    if not target.exists():
                        self._note(key).unlink(missing_ok=True)
        self.shrink()

    def adopt(self, path: Path, key: str, listing: Listing) -> None:
        """Take a thing that is here because it was made here, and is stored by now, from `path` to its place."""
        target = self.root / key
        with self._locked(key, fcntl.LOCK_EX) as note:
            if path != target:
                remove(target)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, target)
            _write(note, listing)
            os.utime(note.fileno())
        self.shrink()

    def forget(self, key: str) -> None:
        """Remove what the store no longer has. What somebody reads just now stays until it is its turn to leave."""
        for _, _, name in self.notes():
            if name == key or name.startswith(f"{key}/"):
                self._drop(name)

    def shrink(self) -> None:
        """Remove what was not used for longest, until the rest is within the limit; what is in use stays."""
        notes = self.notes()
        total = sum(size for _, size, _ in notes)
        now = time.time()
        grace = _GRACE if self.grace is None else self.grace
        for used, size, key in sorted(notes):
            if total <= self.limit or now - used < grace:
                break
            if self._drop(key):
                total -= size
        for path in self._parts.glob("*"):  # what a process was fetching when it was killed
            with contextlib.suppress(OSError):
                if now - path.stat().st_mtime > _STALE:
                    remove(path)

    def bytes(self) -> int:
        """Bytes of all things here."""
        return sum(size for _, size, _ in self.notes())

    @property
    def _parts(self) -> Path:
        return self.root / _NOTES / "parts"

    def _fetch(self, target: Path, listing: Listing, download: Callable[[Iterable[str], Path], None]) -> None:
        staging = self._parts / f"{os.getpid()}-{os.urandom(6).hex()}"
        old = staging.with_suffix(".old")
        self._parts.mkdir(parents=True, exist_ok=True)
        try:
            download(listing, staging)
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.exists():
                os.replace(target, old)
            os.replace(staging, target)
        finally:
            remove(staging)
            remove(old)

    def _drop(self, key: str) -> bool:
        """Remove a thing unless somebody uses it; whether it went."""
        try:
            with self._locked(key, fcntl.LOCK_EX | fcntl.LOCK_NB):
                remove(self.root / key)
                self._note(key).unlink(missing_ok=True)
        except BlockingIOError:
            return False
        return True

    def _note(self, key: str) -> Path:
        return self.root / _NOTES / quote(key, safe="")

    def notes(self) -> list[tuple[float, int, str]]:
        """(last use, bytes, key) of each thing."""
        out = []
        folder = self.root / _NOTES
        for path in folder.iterdir() if folder.is_dir() else []:
            if path.is_dir():
                continue
            try:
                used, listing = path.stat().st_mtime, json.loads(path.read_bytes() or b"{}")
                out.append((used, sum(size for size, _ in listing.values()), unquote(path.name)))
            except (OSError, ValueError):  # just removed, or just being written
                continue
        return out

    @contextmanager
    def _locked(self, key: str, how: int) -> Iterator[BinaryIO]:
        """The note's file, locked. Raises BlockingIOError with LOCK_NB."""
        path = self._note(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            with open(path, "a+b") as note:
                fcntl.flock(note, how)
                try:
                    if os.fstat(note.fileno()).st_ino != path.stat().st_ino:
                        continue  # removed while this waited; there may be a new one
                except FileNotFoundError:
                    continue
                yield note
                return


@contextmanager
def _logged(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        log.warning("%s: %s", what, error)


def _read(note: BinaryIO) -> Any:
    note.seek(0)
    try:
        return json.loads(note.read() or b"null")
    except ValueError:
        return None


def _write(note: BinaryIO, listing: Listing) -> None:
    note.truncate(0)
    note.write(json.dumps(listing).encode())
    note.flush()


def remove(path: Path) -> None:
    """Remove a file or folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
