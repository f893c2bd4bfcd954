"""`lorry restore`: a backup into an empty place, of either database.

Everything is checked and copied beside its place first. Then the rows go in, in one transaction, the folders are renamed
just before its commit, and what ran when the backup was made goes back to the queue.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from sqlalchemy import JSON, Connection, MetaData, func, inspect, select
from sqlalchemy import event as events

from service.archive import BackupError, Reader
from service.backup import FORMAT, pins
from service.db import Database
from service.files.service import sync_folder
from service.jobs import repository
from service.jobs.states import FINAL
from service.locks import UP_LOCK, exclusive
from service.migrate import downgrade, head, known, revision_of, upgrade
from service.models import Base
from service.settings import Settings
from service.storage import Storage, open_storage

FOLDERS = ("files", "adapters", "jobs", "exports")
_AT_ONCE = 500  # rows of one INSERT


@dataclass
class Report:
    """What was restored."""

    rows: dict[str, int]
    files: int
    bytes: int
    requeued: list[str]  # jobs that ran when the backup was made


def check(source: Path) -> dict[str, Any]:
    """Read a backup to its end and compare it with its manifest, which is returned. Raises BackupError."""
    reader = Reader(source)
    try:
        _acceptable(reader)
        for name in reader.files:
            reader.copy(name, None)
        return reader.manifest
    finally:
        reader.close()


def restore(settings: Settings, source: Path, *, replace: bool = False) -> Report:
    """Fill the database and the data folder from a backup.

    Both must be empty (a database without tables, or with empty ones) unless `replace`: then what is there is removed.
    Raises BackupError, with nothing changed unless it says so.
    """
    reader = Reader(source)
    try:
        _acceptable(reader)
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        url = settings.sqlalchemy_url
        with _stopped(settings), exclusive(url, "restore"), pins(settings.data_dir, "restore") as staging:
            if not replace:
                _empty(settings)
            _room(settings, reader)
            for name in reader.files:
                reader.copy(name, staging / name)
            counts = _counted(staging / "rows", reader.manifest["rows"])
            _database(url, reader.manifest["revision"])
            db = Database(url)
            try:
                _fill(db, settings, staging, counts)
            finally:
                db.dispose()
            upgrade(url)
            requeued = _requeue(url)
        total = sum(entry["bytes"] for entry in reader.files.values())
        return Report(counts, len(reader.files), total, requeued)
    finally:
        reader.close()


# Checks


def _acceptable(reader: Reader) -> None:
    manifest = reader.manifest
    if manifest.get("format") != FORMAT:
        raise BackupError(
            f"{reader.source} is of format {manifest.get('format')!r}; lorry {manifest.get('lorry')} made it, and this one "
            f"reads format {FORMAT}"
        )
    if manifest.get("revision") not in known():
        raise BackupError(
            f"{reader.source} was made by lorry {manifest.get('lorry')} at database revision {manifest.get('revision')!r}, "
            f"which this lorry does not know (its newest is {head()}): restore it with that version or a newer one"
        )
    for name in reader.files:
        if PurePosixPath(name).parts[0] not in (*FOLDERS, "rows"):
            raise BackupError(f"{reader.source}: {name!r} has no place in a backup")


@contextmanager
def _stopped(settings: Settings) -> Iterator[None]:
    """Raises BackupError if `lorry up` runs on the data folder."""
    with open(settings.data_dir / UP_LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BackupError(f"`lorry up` runs on {settings.data_dir.absolute()}: stop it first") from None
        yield


def _empty(settings: Settings) -> None:
    """Raises BackupError for rows or files that would be lost."""
    url, why = settings.sqlalchemy_url, "restore into an empty place, or with --replace, which removes what is there"
    if revision_of(url) is not None:
        db = Database(url)
        try:
            with db.engine.connect() as connection:
                for table in _reflect(connection).sorted_tables:
                    if connection.scalar(select(func.count()).select_from(table)):
                        raise BackupError(f"the database is not empty: it has rows in {table.name}; {why}")
        finally:
            db.dispose()
    storage = open_storage(settings)
    for name in FOLDERS:
        if storage.names(name):
            raise BackupError(f"the data folder is not empty: there is something in {storage.address(name)}; {why}")


def _room(settings: Settings, reader: Reader) -> None:
    size = sum(entry["bytes"] for entry in reader.files.values())
    free = shutil.disk_usage(settings.data_dir).free
    if size > free:
        raise BackupError(f"no room in {settings.data_dir.absolute()}: the backup has {size} bytes, {free} are free")


# Filling


def _counted(rows: Path, expected: dict[str, int]) -> dict[str, int]:
    """Rows by table. Raises BackupError if they are not as many as the manifest says."""
    for name, count in expected.items():
        found = sum(len(some) for some in _batches(rows / f"{name}.jsonl"))
        if found != count:
            raise BackupError(f"the backup is damaged: it has {found} rows of {name}, its manifest says {count}")
    return expected


def _database(url: str, revision: str) -> None:
    """Bring the database to the backup's revision."""
    present = revision_of(url)
    if present == revision:
        return
    if present is not None:
        if present not in known():
            raise BackupError(f"the database is at revision {present}, which this lorry does not know")
        downgrade(url, "base")
    upgrade(url, revision)


def _reflect(connection: Connection, more: Iterable[str] = ()) -> MetaData:
    """Our tables, and `more`, as they are in the database: its revision need not be the models'.

    A database may have tables of others; those are not looked at.
    """
    metadata = MetaData()

    @events.listens_for(metadata, "column_reflect")
    def _null_is_null(inspector: Any, table: Any, column: dict[str, Any]) -> None:
        if isinstance(column["type"], JSON):
            column["type"] = JSON(none_as_null=True)  # as in the models: None is no JSON null

    ours = {*Base.metadata.tables, *more}
    metadata.reflect(connection, only=sorted(ours.intersection(inspect(connection).get_table_names())))
    return metadata


def _fill(db: Database, settings: Settings, staging: Path, counts: dict[str, int]) -> None:
    """Put the rows in place of those that are there, and the folders in their places."""
    engine = db.engine.execution_options(lorry_write=True)
    storage = open_storage(settings)
    before = {f"{folder}/{name}" for folder in FOLDERS for name in storage.names(folder)} if storage.remote else set()
    stored = _store(storage, staging) if storage.remote else set()
    moved: list[tuple[Path, Path]] = []
    try:
        with engine.begin() as connection:
            metadata = _reflect(connection, counts)
            if unknown := counts.keys() - metadata.tables.keys():
                raise BackupError(f"the backup has rows of tables that there are none of: {', '.join(sorted(unknown))}")
            for table in reversed(metadata.sorted_tables):
                connection.execute(table.delete())
            for table in metadata.sorted_tables:
                for some in _batches(staging / "rows" / f"{table.name}.jsonl"):
                    for row in some:
                        if row.get("path") and table.name in ("adapters", "checkpoints"):
                            row["path"] = _inside(storage, row["path"])
                    connection.execute(table.insert(), some)
            for name in FOLDERS if not storage.remote else ():
                target = settings.data_dir / name
                for old, new in ((target, staging / f"{name}.replaced"), (staging / name, target)):
                    if old.exists():
                        os.replace(old, new)
                        moved.append((old, new))
            sync_folder(settings.data_dir)
    except (
        BaseException
    ):  # a folder that cannot be moved, or a commit that fails: the rows are as they were, so the files
        for old, new in reversed(moved):
            os.replace(new, old)
        for key in stored - before:
            storage.remove(key)
        raise
    for key in before - stored:
        storage.remove(key)


def _store(storage: Storage, staging: Path) -> set[str]:
    """Put the backup's files into an object store; what is there already goes once the rows are in. Returns the keys of
    their folders, as names right below FOLDERS."""
    runs = {
        row["job_id"]: row["id"]
        for some in _batches(staging / "rows" / "runs.jsonl")
        for row in some
        if row["outcome"] in FINAL
    }
    stored: set[str] = set()
    for path in sorted(p for name in FOLDERS for p in (staging / name).rglob("*") if p.is_file()):
        name, entry, *rest = path.relative_to(staging).parts
        if name == "exports":
            entry = storage.own_key(entry, runs.get(entry))
        elif name == "jobs" and rest == ["log.txt"]:
            rest = [storage.own_key("log.txt", runs.get(entry))]
        stored.add(f"{name}/{entry}")
        storage.store(path, "/".join((name, entry, *rest)), move=False)
    return stored


def _inside(storage: Storage, place: str) -> str:
    """What a row is to say for a place in the backup. Raises BackupError."""
    path = PurePosixPath(place)
    if path.is_absolute() or ".." in path.parts or path.parts[0] not in FOLDERS:
        raise BackupError(f"the backup is damaged: {place!r} is no place in a data folder")
    return place if storage.remote else str(storage.place(place))


def _batches(path: Path) -> Iterator[list[dict[str, Any]]]:
    if not path.is_file():
        return
    some: list[dict[str, Any]] = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            some.append(json.loads(line))
            if len(some) == _AT_ONCE:
                yield some
                some = []
    if some:
        yield some


def _requeue(url: str) -> list[str]:
    """End the runs of the moment of the backup; their jobs go on from what checkpoints they had. Returns those jobs."""
    db = Database(url)
    out = []
    try:
        with db.write() as session:
            for row in repository.active(session):
                if row.run_id is not None:
                    reason = "restored from a backup that was made while it ran"
                    if repository.end_run(session, row.id, row.run_id, "queued", reason=reason):
                        out.append(row.id)
    finally:
        db.dispose()
    return out
