"""`lorry backup`: the rows of one moment and the files they refer to, while everything runs.

The rows are read in one transaction that sees one moment (SQLite's WAL, Postgres' REPEATABLE READ) and written as JSON
lines, which either database takes back. Files are never changed in place, only made, renamed and removed; so what the
rows name is pinned with hard links right after the reading, and copied at leisure. What vanished in between means
another reading.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import Table, select
from sqlalchemy.orm import Session

from service import __version__
from service.archive import BackupError, Writer, writing
from service.db import Database
from service.files.service import file_key
from service.jobs.repository import final_run
from service.jobs.states import FINAL
from service.migrate import head, revision_of
from service.models import AdapterRow, ArtifactRow, Base, CheckpointRow, FileRow, JobRow
from service.retention import RESUME_FILES, needed
from service.settings import Settings
from service.storage import Storage, open_storage

FORMAT = 1
_TRIES = 6
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_RESUMABLE_FILES = (*_ADAPTER_FILES, "trainer_state.json", "optimizer.pt", "lorry_trainer.json")


@dataclass
class Thing:
    """A row whose files belong to it: `files` by their place in the backup, known once they are pinned."""

    table: str
    key: tuple[Any, ...]
    source: str  # in the data root: a file, or a folder of which all is wanted but `without`
    place: str
    bytes: int | None = None  # what the row says
    sha256: str | None = None
    required: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    optional: bool = False  # no row: a log
    files: dict[str, Path] = field(default_factory=dict)


@dataclass
class Report:
    """What is in a backup, and what is not."""

    rows: dict[str, int]
    files: int = 0
    bytes: int = 0
    left_out: dict[str, int] = field(default_factory=dict)  # rows of what was not asked for, by table
    deleted: list[str] = field(default_factory=list)  # went while the backup was made
    missing: list[str] = field(default_factory=list)  # rows whose files were gone before: the installation is damaged
    damaged: list[str] = field(default_factory=list)  # files that are not what their row says


def backup(settings: Settings, target: Path, *, exports: bool = False, checkpoints: bool = False) -> Report:
    """Make a backup at `target`, a folder or, with that suffix, a .tar. Jobs may run meanwhile.

    Without `exports` only their manifests are in it; without `checkpoints` those of finished jobs are only where something
    relies on them (service.retention.needed), and always without optimizer states. Raises BackupError.
    """
    url = settings.sqlalchemy_url
    if (found := revision_of(url)) != head():
        raise BackupError(
            f"the database is at revision {found or 'none'}, this lorry's is {head()}: make the backup with the lorry that "
            "runs on it, or run `lorry migrate` first"
        )
    about: dict[str, Any] = {
        "format": FORMAT,
        "lorry": __version__,
        "revision": found,
        "created_at": int(time.time()),
        "exports": exports,
        "checkpoints": checkpoints,
    }
    db = Database(url)
    try:
        with pins(settings.data_dir) as pinned, writing(target, about) as writer:
            rows = pinned / "rows"
            report, things = _gather(db, settings, pinned, rows, exports, checkpoints)
            _room_for(target.parent, things)
            for thing in things:
                _copy(writer, thing, report)
            for path in sorted(rows.iterdir()):
                writer.add(f"rows/{path.name}", path)
            report.files = len(writer.files)
            report.bytes = sum(entry["bytes"] for entry in writer.files.values())
            about |= {"database": "SQLite" if db.sqlite else "Postgres", "rows": report.rows}
            about |= {name: getattr(report, name) for name in ("left_out", "deleted", "missing", "damaged")}
    finally:
        db.dispose()
    return report


def _gather(
    db: Database, settings: Settings, pinned: Path, rows: Path, exports: bool, checkpoints: bool
) -> tuple[Report, list[Thing]]:
    """Read the rows and pin their files, again if something vanished in between; the rows of what is gone are dropped."""
    rows.mkdir()
    storage = open_storage(settings)
    for attempt in range(_TRIES):
        last = attempt == _TRIES - 1
        with snapshot(db) as session:
            # First the files, which may go at any time; the moment stays for as long as the transaction does.
            left_out: dict[str, set[tuple[Any, ...]]] = {"checkpoints": set(), "artifacts": set()}
            things: list[Thing] = []
            gone: list[Thing] = []
            for thing in _choose(session, storage, exports, checkpoints, left_out):
                whole = _pin(storage, thing, pinned, exact=not last)
                (things if whole or thing.optional else gone).append(thing)
            if not gone or last:
                report = Report({table.name: _dump(session, table, rows) for table in Base.metadata.sorted_tables})
                break
        time.sleep(0.2 * (attempt + 1))
    report.left_out = {table: len(keys) for table, keys in left_out.items() if keys}
    with db.read() as session:
        for thing in gone:
            name = f"{thing.table} {'@'.join(map(str, thing.key))}"
            here = session.get(_CLASSES[thing.table], thing.key) is not None
            (report.missing if here else report.deleted).append(name)
            left_out.setdefault(thing.table, set()).add(thing.key)
    for table, keys in left_out.items():
        report.rows[table] -= _drop(rows, Base.metadata.tables[table], keys)
    places = {(t.table, t.key): t.place for t in things}
    for table in ("adapters", "checkpoints"):
        _place(rows, Base.metadata.tables[table], places)
    return report, things


_CLASSES: dict[str, type[Base]] = {
    "files": FileRow,
    "adapters": AdapterRow,
    "checkpoints": CheckpointRow,
    "artifacts": ArtifactRow,
}


@contextmanager
def snapshot(db: Database) -> Iterator[Session]:
    """A session all of whose queries see the database as of one moment."""
    with db.read() as session:
        if not db.sqlite:  # on SQLite a transaction in WAL mode is one
            session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
        yield session


# Rows


def _dump(session: Session, table: Table, folder: Path) -> int:
    """Write a table as JSON lines, in order of its key; returns how many."""
    count = 0
    query = select(table).order_by(*table.primary_key).execution_options(yield_per=500)
    with open(folder / f"{table.name}.jsonl", "w", encoding="utf-8") as file:
        for row in session.execute(query).mappings():
            file.write(json.dumps(dict(row), ensure_ascii=False) + "\n")
            count += 1
    return count


def _rewrite(
    rows: Path, table: Table, change: Callable[[tuple[Any, ...], dict[str, Any]], dict[str, Any] | None]
) -> int:
    """Pass each row through `change`, which may drop it; returns how many were."""
    path, staging = rows / f"{table.name}.jsonl", rows / f".{table.name}"
    dropped = 0
    with open(path, encoding="utf-8") as old, open(staging, "w", encoding="utf-8") as new:
        for line in old:
            row = json.loads(line)
            changed = change(tuple(row[c.name] for c in table.primary_key), row)
            if changed is None:
                dropped += 1
            else:
                new.write(json.dumps(changed, ensure_ascii=False) + "\n")
    os.replace(staging, path)
    return dropped


def _drop(rows: Path, table: Table, keys: set[tuple[Any, ...]]) -> int:
    return _rewrite(rows, table, lambda key, row: None if key in keys else row) if keys else 0


def _place(rows: Path, table: Table, places: dict[tuple[str, tuple[Any, ...]], str]) -> None:
    """Paths as they will be below the data folder that the backup is restored into."""
    _rewrite(rows, table, lambda key, row: {**row, "path": places.get((table.name, key))})


# Files


def _choose(
    session: Session,
    storage: Storage,
    exports: bool,
    checkpoints: bool,
    left_out: dict[str, set[tuple[Any, ...]]],
) -> Iterator[Thing]:
    """The things to copy, those first that go soonest; fills in the keys of rows that are left out on purpose."""
    query = select(CheckpointRow, JobRow.status).join(JobRow, JobRow.id == CheckpointRow.job_id)
    for row, status in session.execute(query.order_by(JobRow.status.in_(FINAL))).all():
        key, live = (row.job_id, row.step), status not in FINAL
        if not (live or checkpoints or needed(session, row)):
            left_out["checkpoints"].add(key)
            continue
        place = f"jobs/{row.job_id}/checkpoints/checkpoint-{row.step}"
        required, without = (_RESUMABLE_FILES, ()) if live else (_ADAPTER_FILES, RESUME_FILES)
        # Of a finished job's, optimizer states may be gone already, and are left out: the row's size says nothing then.
        size = row.bytes if live else None
        yield Thing("checkpoints", key, row.path, place, size, required=required, without=without)
    for file in session.scalars(select(FileRow)).all():
        where = file_key(file)
        yield Thing("files", (file.id,), where, where, file.bytes, file.sha256)
    for adapter in session.scalars(select(AdapterRow).where(AdapterRow.path.is_not(None))).all():
        path = str(adapter.path)
        place = f"adapters/{Path(path).name}"
        yield Thing("adapters", (adapter.name,), path, place, adapter.bytes, required=_ADAPTER_FILES)
    for artifact in session.scalars(select(ArtifactRow)).all():
        named = (artifact.job_id, artifact.path)
        if not exports and artifact.path != "manifest.json":
            left_out["artifacts"].add(named)
            continue
        place = f"exports/{artifact.job_id}/{artifact.path}"
        folder = storage.own_key(f"exports/{artifact.job_id}", final_run(session, artifact.job_id))
        yield Thing("artifacts", named, f"{folder}/{artifact.path}", place, artifact.bytes, artifact.sha256)
    if storage.remote:
        logs = [f"jobs/{name}" for name in storage.files("jobs") if name.count("/") == 1 and "/log.txt" in name]
    else:
        logs = [f"jobs/{job_id}/log.txt" for job_id in session.scalars(select(JobRow.id))]
    for log in logs:
        yield Thing("jobs", (log.split("/")[1],), log, log, optional=True)


def _pin(storage: Storage, thing: Thing, pinned: Path, *, exact: bool) -> bool:
    """Link to a thing's files, so that they stay; False if it is not whole. With `exact`, as large as its row says."""
    try:
        before = storage.files(thing.source)
        thing.files = {}
        for relative in before:
            if relative in thing.without:
                continue
            source = f"{thing.source}/{relative}" if relative else thing.source
            name = f"{thing.place}/{relative}" if relative else thing.place
            thing.files[name] = storage.pin(source, pinned / "data" / name)
        whole = bool(before) and before.keys() == storage.files(thing.source).keys()
        whole = whole and {f"{thing.place}/{r}" for r in thing.required} <= thing.files.keys()
        if exact and thing.bytes is not None:
            whole = whole and sum(p.stat().st_size for p in thing.files.values()) == thing.bytes
    except FileNotFoundError:
        whole = False
    if not whole:
        thing.files = {}
    return whole


def _copy(writer: Writer, thing: Thing, report: Report) -> None:
    for name, path in sorted(thing.files.items()):
        try:
            entry = writer.add(name, path)
        except FileNotFoundError as error:  # only without hard links
            raise BackupError(f"{path} vanished while it was copied; try again") from error
        if thing.sha256 is not None and entry["sha256"] != thing.sha256:
            report.damaged.append(name)


def _room_for(folder: Path, things: list[Thing]) -> None:
    size = sum(path.stat().st_size for thing in things for path in thing.files.values())
    free = shutil.disk_usage(folder).free
    if size > free:
        raise BackupError(f"no room at {folder}: the backup has {size} bytes, {free} are free")


@contextmanager
def pins(data_dir: Path, name: str = "backup") -> Iterator[Path]:
    """A folder inside the data folder, hence on its file system, for as long as the block lasts.

    Those of processes that died are removed: their lock is free.
    """
    for old in data_dir.glob(f".{name}-*"):
        with _locked(old) as free:
            if free:
                shutil.rmtree(old, ignore_errors=True)
    folder = data_dir / f".{name}-{os.getpid()}-{os.urandom(3).hex()}"
    folder.mkdir(parents=True, mode=0o700)
    try:
        with _locked(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        yield False
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(handle)
