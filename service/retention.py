"""What is let go as time passes: found by plan(), removed by remove(), which looks again under the rows' locks.

Nothing that an unfinished job, an adapter or an accepted export needs is ever touched. Where a thing has a row and files
the row goes first: a crash in between leaves files without a row, which a later pass finds, never a row without its
files. One process at a time prunes; a file lock or advisory lock sees to that (service.locks).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from sqlalchemy import Text, cast, delete, func, or_, select, update
from sqlalchemy.orm import Session

from service.adapters import repository as adapters
from service.db import Database
from service.errors import Conflict, NotFound
from service.files import service as files
from service.jobs.states import FINAL
from service.locks import exclusive
from service.models import AdapterRow, CheckpointRow, EventRow, FileRow, JobRow
from service.settings import Settings
from service.storage import Storage, StorageUnavailable, open_storage

log = logging.getLogger("lorry.retention")
_DAY = 86_400.0
_ORPHAN_DAYS = 1.0  # a file without a row may be on its way to one
_EVENTS_AT_ONCE = 5_000  # rows of one transaction: others want to write, too
# Of a checkpoint, what only a resumed run reads. The rest is the adapter and what tells of it.
RESUME_FILES = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth")


@dataclass(frozen=True)
class Item:
    """One thing to let go."""

    kind: str  # one of REASONS
    ref: str  # file, job@step, or job
    bytes: int
    paths: tuple[str, ...] = ()  # in the data root: keys, or what rows say


REASONS = {
    "optimizer state": "checkpoints of jobs that ended over LORRY_KEEP_OPTIMIZER_DAYS ago",
    "checkpoint": "jobs that ended over LORRY_KEEP_CHECKPOINTS_DAYS (failed: LORRY_KEEP_FAILED_DAYS) ago",
    "refused export": "jobs that ended over LORRY_KEEP_FAILED_DAYS ago",
    "upload": "unused for over LORRY_KEEP_UPLOADS_DAYS",
    "events": "jobs that ended over LORRY_KEEP_EVENTS_DAYS ago; status events stay",
    "log": "log and TensorBoard files of jobs that ended over LORRY_KEEP_LOGS_DAYS ago",
    "orphan": "files that have lost their row",
}


@dataclass
class Pruned:
    """What a pass did."""

    gone: list[Item] = field(default_factory=list)
    kept: list[Item] = field(default_factory=list)  # needed by something since the look, or not to be removed

    @property
    def bytes(self) -> int:
        return sum(item.bytes for item in self.gone)


def prune(db: Database, settings: Settings, *, stop: Callable[[], bool] = lambda: False) -> Pruned | None:
    """Find and remove what the settings let go; None if another process is at it."""
    with exclusive(settings.sqlalchemy_url, "prune", wait=False) as mine:
        if not mine:
            return None
        report = Pruned()
        for item in plan(db, settings):
            if stop():
                break
            try:
                gone = remove(db, settings, item)
            except (
                OSError,
                StorageUnavailable,
            ) as error:  # one file that cannot be removed must not keep all behind it
                log.warning("could not remove %s %s: %s", item.kind, item.ref, error)
                gone = False
            (report.gone if gone else report.kept).append(item)
        if report.gone:
            log.info("let go of %d things, %d bytes", len(report.gone), report.bytes)
        return report


async def prune_forever(db: Database, settings: Settings) -> None:
    """In an API process: a pass every LORRY_PRUNE_SECONDS, the first a minute after the start. Ends when cancelled."""
    ended = False
    await asyncio.sleep(min(60.0, settings.prune_seconds))
    try:
        while True:
            try:
                await asyncio.to_thread(prune, db, settings, stop=lambda: ended)
            except Exception:  # the database may be away for a while; the next pass tries again
                log.exception("prune failed, will try again in %g s", settings.prune_seconds)
            await asyncio.sleep(settings.prune_seconds)
    finally:
        ended = True  # cancelling does not reach the thread


# Finding


def plan(db: Database, settings: Settings, now: float | None = None) -> list[Item]:
    """What could go now, in the order in which it would."""
    now = time.time() if now is None else now
    held = loaded(settings)
    storage = open_storage(settings)
    with db.read() as session:
        return [
            *_uploads(session, settings, now),
            *_checkpoints(session, settings, storage, now, held),
            *_refused(session, settings, storage, now),
            *_logs(session, settings, storage, now),
            *_events(session, settings, now),
            *_orphans(session, settings, storage, now),
        ]


def loaded(settings: Settings) -> frozenset[str]:
    """Names that the engines hold; one that does not answer serves nothing."""
    names: set[str] = set()
    for url in settings.engine_urls:
        try:
            answer = httpx.get(f"{url}/v1/models", timeout=2, trust_env=False)
            names |= {str(card["id"]) for card in answer.raise_for_status().json()["data"]}
        except (httpx.HTTPError, ValueError, KeyError, TypeError):
            continue
    return frozenset(names)


def _uploads(session: Session, settings: Settings, now: float) -> Iterator[Item]:
    before = now - settings.keep_uploads_days * _DAY
    old = session.scalars(select(FileRow).where(FileRow.created_at < before).order_by(FileRow.id)).all()
    if not old:
        return
    recent = JobRow.status.not_in(FINAL) | (JobRow.finished_at >= before)
    still: set[str | None] = set()
    for name in ("file_id", "eval_file_id"):
        file_id = JobRow.spec[("dataset", name)].as_string()
        still |= set(session.scalars(select(file_id).where(JobRow.kind != "export", recent)))
    for row in old:
        if row.id not in still:
            yield Item("upload", row.id, row.bytes, (files.file_key(row),))


def _checkpoints(
    session: Session, settings: Settings, storage: Storage, now: float, held: Collection[str]
) -> Iterator[Item]:
    """Whole checkpoints of jobs that ended long ago, else the optimizer states of those that ended."""
    days = {"succeeded": settings.keep_checkpoints_days}
    ended = (
        select(CheckpointRow, JobRow.status, JobRow.finished_at)
        .join(JobRow, JobRow.id == CheckpointRow.job_id)
        .where(JobRow.status.in_(FINAL), JobRow.finished_at.is_not(None))
        .order_by(CheckpointRow.job_id, CheckpointRow.step)
    )
    for row, status, finished in session.execute(ended).all():
        assert finished is not None
        path, ref = row.path, f"{row.job_id}@{row.step}"
        age = (now - finished) / _DAY
        if age > days.get(status, settings.keep_failed_days) and not needed(session, row, held):
            yield Item("checkpoint", ref, row.bytes, (path,))
        elif age > settings.keep_optimizer_days:
            sizes = {name: size for name, size in storage.files(path).items() if name in RESUME_FILES}
            if sizes:
                yield Item("optimizer state", ref, sum(sizes.values()), tuple(f"{path}/{name}" for name in sizes))


def needed(session: Session, row: CheckpointRow, held: Collection[str] = ()) -> bool:
    """Whether something relies on a checkpoint of a finished job.

    That is: its job's adapter is pinned, an adapter was made from it, an unfinished job names it, or (`held`) the engine
    has it loaded.
    """
    own = session.scalar(select(AdapterRow).where(AdapterRow.job_id == row.job_id))
    if own is not None and own.pinned:
        return True
    names = [row.job_id, *([own.name] if own is not None else [])]
    made = or_(*(AdapterRow.parent.startswith(f"{name}@", autoescape=True) for name in names))
    parents = session.scalars(select(AdapterRow.parent).where(made))
    mine = {(name, row.step) for name in names}
    return any(_split(ref or "") in mine for ref in [*parents, *adapters.checkpoints_named(session, names), *held])


def _refused(session: Session, settings: Settings, storage: Storage, now: float) -> Iterator[Item]:
    """Exports that failed their verification, kept aside for a look."""
    refused = [name for name in storage.names("exports") if name.endswith(".rejected")]
    ids = {name.removesuffix(".rejected"): f"exports/{name}" for name in refused}
    for job_id in _ended(session, ids, now - settings.keep_failed_days * _DAY):
        yield Item("refused export", job_id, _size(storage, ids[job_id]), (ids[job_id],))


def _logs(session: Session, settings: Settings, storage: Storage, now: float) -> Iterator[Item]:
    for job_id in _ended(session, storage.names("jobs"), now - settings.keep_logs_days * _DAY):
        names = [n for n in storage.names(f"jobs/{job_id}") if n == "tensorboard" or n.startswith("log.txt")]
        present = tuple(f"jobs/{job_id}/{n}" for n in names)
        if present:
            yield Item("log", job_id, sum(_size(storage, p) for p in present), present)


def _events(session: Session, settings: Settings, now: float) -> Iterator[Item]:
    query = (
        select(EventRow.job_id, func.sum(func.length(cast(EventRow.data, Text))))
        .join(JobRow, JobRow.id == EventRow.job_id)
        .where(
            JobRow.status.in_(FINAL),
            JobRow.finished_at < now - settings.keep_events_days * _DAY,
            EventRow.type != "status",
        )
        .group_by(EventRow.job_id)
        .order_by(EventRow.job_id)
    )
    for job_id, size in session.execute(query):
        yield Item("events", job_id, int(size))


def _orphans(session: Session, settings: Settings, storage: Storage, now: float) -> Iterator[Item]:
    """Files whose row went before a crash."""
    before = now - _ORPHAN_DAYS * _DAY
    names = [n for n in storage.names("files") if n.startswith("file-") and storage.modified(f"files/{n}") < before]
    folders = [f for f in _checkpoint_folders(storage) if storage.modified(f) < before]
    if not names and not folders:
        return
    known = set(session.scalars(select(FileRow.id)))
    for name in names:
        if name.partition(".")[0] not in known:
            yield Item("orphan", name, _size(storage, f"files/{name}"), (f"files/{name}",))
    over = set(_ended(session, {f.split("/")[1] for f in folders}, before))
    # With a local root by its step, as the folder's name has it; in an object store the name is a run's own.
    rows = {
        (job_id, Path(path).name if storage.remote else f"checkpoint-{step}")
        for job_id, step, path in session.execute(select(CheckpointRow.job_id, CheckpointRow.step, CheckpointRow.path))
    }
    for folder in folders:
        _, job_id, _, name = folder.split("/")
        if job_id in over and (job_id, name) not in rows:
            yield Item("orphan", f"{job_id}/{name}", _size(storage, folder), (folder,))


def _checkpoint_folders(storage: Storage) -> list[str]:
    """Keys of all checkpoints, in order."""
    if storage.remote:  # one listing of all that is below, for a store has no other
        found = ("/".join(["jobs", *name.split("/")[:3]]) for name in storage.files("jobs") if name.count("/") > 2)
        return sorted({f for f in found if f.split("/")[2:3] == ["checkpoints"]})
    paths = storage.root.glob("jobs/*/checkpoints/checkpoint-*")
    return sorted(p.relative_to(storage.root).as_posix() for p in paths)


def _ended(session: Session, ids: Collection[str], before: float) -> list[str]:
    """Those of these jobs that ended before."""
    out: list[str] = []
    ordered = sorted(ids)
    for n in range(0, len(ordered), 500):
        some = JobRow.id.in_(ordered[n : n + 500])
        query = select(JobRow.id).where(some, JobRow.status.in_(FINAL), JobRow.finished_at < before)
        out += session.scalars(query.order_by(JobRow.id))
    return out


# Removing


def remove(db: Database, settings: Settings, item: Item) -> bool:
    """Let one thing go, unless something has come to need it; whether it went."""
    storage = open_storage(settings)
    match item.kind:
        case "upload":
            try:
                files.delete(db, settings, item.ref)
            except Conflict:
                return False
            except NotFound:  # a client deleted it meanwhile
                pass
        case "checkpoint":
            return _remove_checkpoint(db, storage, item)
        case "optimizer state":
            job_id, step = _split(item.ref)
            row = (CheckpointRow.job_id == job_id, CheckpointRow.step == step)
            rest = _size(storage, item.paths[0].rpartition("/")[0]) - sum(_size(storage, p) for p in item.paths)
            with db.write() as session:
                session.execute(update(CheckpointRow).where(*row).values(bytes=rest))
            _remove_files(storage, item)
        case "events":
            _remove_events(db, item.ref)
        case _:  # files alone, of jobs in a state that is final
            _remove_files(storage, item)
    return True


def _remove_checkpoint(db: Database, storage: Storage, item: Item) -> bool:
    with db.write() as session:
        # Held before the look: a job that would start from it has either been stored by now, or will find no row.
        row = session.get(CheckpointRow, _split(item.ref), with_for_update=True)
        if row is None:
            return False
        if needed(session, row):
            return False
        session.delete(row)
    _remove_files(storage, item)
    return True


def _remove_events(db: Database, job_id: str) -> None:
    chosen = select(EventRow.seq).where(EventRow.job_id == job_id, EventRow.type != "status")
    while True:
        with db.write() as session:
            some = session.scalars(chosen.order_by(EventRow.seq).limit(_EVENTS_AT_ONCE)).all()
            if not some:
                return
            session.execute(
                delete(EventRow).where(EventRow.job_id == job_id, EventRow.type != "status", EventRow.seq <= some[-1])
            )


def _remove_files(storage: Storage, item: Item) -> None:
    for path in item.paths:
        storage.remove(path)


def _split(ref: str) -> tuple[str, int | None]:
    """`name@step` as (name, step)."""
    name, _, step = ref.partition("@")
    return name, int(step) if step.isascii() and step.isdecimal() else None


def _size(storage: Storage, where: str) -> int:
    """Bytes of a file, or of all files of a folder; what vanishes meanwhile counts for nothing."""
    return sum(storage.files(where).values())
