"""What SQL says against what the heartbeats, the queue and the disk say. Run at start and every few seconds, by the API
and by each worker; every step is a compare-and-set or touches only what no run can own any more, so any number of
processes may run it at once.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from redis.exceptions import RedisError
from sqlalchemy import select
from sqlalchemy.exc import OperationalError

from service.db import Database
from service.files.service import drop_unfinished
from service.jobs import repository
from service.jobs.states import FINAL
from service.logs import about_job, tail
from service.models import AdapterRow, ArtifactRow, JobRow, RunRow
from service.queue import JobQueue
from service.settings import Settings
from service.storage import Storage, StorageUnavailable, open_storage

log = logging.getLogger("lorry.reconcile")
_DISK_EVERY = 6  # passes: the disk is looked at less often than heartbeats and queue
_SCRATCH_SECONDS = 3600.0  # after which the folder of a finished job's run, which is in an object store, is left over
_CHUNK = 500  # ids in one query
_UNHEARD_SECONDS = 30.0  # a worker may take so long to start, and a dead one so long to be forgotten


@dataclass
class Report:
    """What one pass did and saw, by job id, adapter name or path."""

    requeued: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    enqueued: list[str] = field(default_factory=list)
    swept: list[Path] = field(default_factory=list)  # leftovers of ended runs, removed
    missing: list[str] = field(default_factory=list)  # finished adapters whose folder is gone
    unknown: list[Path] = field(default_factory=list)  # folders of jobs that SQL does not know: reported, never touched


class Watch:
    """What this process has seen of the heartbeats of one database's runs.

    No two hosts' clocks are compared, and a clock that is set does no harm: a run is silent for as long as this process
    has watched its heartbeat, whatever its value, not change.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.lock = threading.Lock()
        self.clock = clock
        self.passes = 0
        self.told: set[str | Path] = set()  # what the log has been told of already
        self._unheard: dict[str, tuple[float, bool]] = {}  # queue → (since when, whether the log has been told)
        self._last = 0.0
        self._seen: dict[str, tuple[tuple[str, float], float]] = {}  # job → ((run, heartbeat), seconds of silence)

    def look(self, beats: Mapping[str, tuple[str, float]], longest: float) -> dict[str, float]:
        """Seconds for which each job's (run, heartbeat) has been the same. Between two looks at most `longest` counts:

        if this process was suspended, its host was perhaps too, with the runs on it.
        """
        now = self.clock()
        passed, self._last = min(now - self._last, longest), now
        before, self._seen = self._seen, {}
        for job_id, beat in beats.items():
            old = before.get(job_id)
            self._seen[job_id] = (beat, old[1] + passed if old and old[0] == beat else 0.0)
        return {job_id: silence for job_id, (_, silence) in self._seen.items()}

    def unheard(self, names: Iterable[str]) -> list[str]:
        """Of the queues that nobody listens to now, those of which it is time to tell; each once until it is heard."""
        now = self.clock()
        self._unheard = {name: self._unheard.get(name, (now, False)) for name in names}
        due = [n for n, (since, told) in self._unheard.items() if not told and now - since >= _UNHEARD_SECONDS]
        self._unheard |= {name: (now, True) for name in due}
        return due

    def forget(self) -> None:
        """Watch anew: no run could write a heartbeat while the database was away or full."""
        self._seen = {}


_watches: defaultdict[str, Watch] = defaultdict(Watch)  # by database, for the life of the process


def reconcile(db: Database, queue: JobQueue, settings: Settings, *, store: bool = True) -> Report:
    """Lost runs go back to the queue; children of failed jobs fail; queued jobs that the queue lacks are put there;
    what ended runs left on disk is removed. Raises OperationalError while the database is out of reach.

    Without `store` an object store is not looked at, which may take long when it is away: a worker has a child to watch.
    """
    report = Report()
    watch = _watches[str(db.engine.url)]
    with watch.lock:
        try:
            give_back_lost(db, queue, settings, watch, report)
        except OperationalError:
            watch.forget()
            raise
        fail_orphans(db, queue, report)
        fill_queue(db, queue, watch, report)
        if watch.passes % _DISK_EVERY == 0:
            try:
                compare_disk(db, settings, report, store=store)
            except (OSError, StorageUnavailable) as error:
                log.warning("could not look through the data folder, will try again: %s", error)
            tell(watch, report)
        watch.passes += 1
    return report


def give_back_lost(db: Database, queue: JobQueue, settings: Settings, watch: Watch, report: Report) -> None:
    """Runs whose heartbeat stands still are dead, or fenced from here on."""
    timeout = settings.heartbeat_timeout_seconds
    with db.read() as session:
        beats = {r.id: (r.run_id or "", r.heartbeat_at or 0.0) for r in repository.active(session)}
    silences = watch.look(beats, longest=max(2 * settings.reconcile_seconds, timeout / 4))
    for job_id, silence in silences.items():
        if silence >= timeout:
            run_id, beat = beats[job_id]
            reason = f"no heartbeat for {timeout:g} s: its worker or host was lost"
            give_back(db, queue, settings, job_id, run_id, code="worker_lost", reason=reason, beat=beat, report=report)


def fill_queue(db: Database, queue: JobQueue, watch: Watch, report: Report) -> None:
    """Put there what SQL says may run and the queues do not have: entries lost with a server, or never written.

    Each queue that has entries and no worker is logged, once it has been so for a while.
    """
    try:
        with db.read() as session:
            ready = repository.ready_to_run(session)
        missing = set(ready) - queue.waiting() if ready else set()
        for some in _chunks([job_id for job_id in ready if job_id in missing]):
            with db.read() as session:
                fields = repository.queue_fields(session, some)
            for job_id in some:
                queue.enqueue(job_id, fields[job_id])
                report.enqueued.append(job_id)
        unheard = queue.unheard() if ready else {}
    except RedisError as error:
        log.warning("queue out of reach, will try again: %s", error)
        return
    for name in watch.unheard(unheard):
        log.warning(
            "no worker takes jobs from the queue %s, where %d wait: start `lorry worker`, with LORRY_WORKER_QUEUES if "
            "those that run serve other needs",
            name,
            unheard[name],
        )


def give_back(
    db: Database, queue: JobQueue, settings: Settings, job_id: str, run_id: str | None, *, code: str, reason: str,
    beat: float | None = None, report: Report | None = None,
) -> None:  # fmt: skip
    """End a run that died: back to the queue with attempt + 1, or as it was asked to end, or failed for good.

    With `beat`, only if that is still its last heartbeat.
    """
    if run_id is None:
        return
    lines = tail(settings.job_dir(job_id) / "log.txt", run_id)  # the run itself had no time to put them there
    with db.write() as session:
        row = repository.get(session, job_id)
        if row is None or row.run_id != run_id or (beat is not None and row.heartbeat_at != beat):
            return
        run = session.get(RunRow, run_id)
        if run is not None:
            run.record = {**run.record, "log_tail": lines}
        if row.attempt >= settings.max_attempts:
            message = f"attempt {row.attempt} of {settings.max_attempts}: {reason}"
            error = {"code": code, "message": message, "rows": []}
            ended = repository.end_run(session, job_id, run_id, "failed", reason=reason, error=error)
        else:
            ended = repository.end_run(session, job_id, run_id, "queued", reason=reason, attempt=row.attempt + 1)
    if ended is None:
        return
    log.warning("run %s of job %s: %s; the job is %s", run_id, job_id, reason, ended, extra=about_job(job_id))
    if report:
        (report.requeued if ended == "queued" else report.failed).append(job_id)
    after_end(db, queue, job_id)


def fail_orphans(db: Database, queue: JobQueue, report: Report | None = None) -> None:
    """Fail jobs whose parent failed or was cancelled, and theirs in turn."""
    while True:
        with db.read() as session:
            orphans = repository.orphaned(session)
        moved = False
        for job_id, parent, cause in orphans:
            cause = cause or {}
            reason = f"parent job {parent} did not succeed: {cause.get('message')}"
            error = {"code": "parent_failed", "message": reason, "rows": [], "parent": parent, "cause": cause}
            with db.write() as session:
                moved |= repository.transition(
                    session, job_id, ["queued", "paused"], "failed", reason=reason, error=error
                )
            queue.remove(job_id)
            queue.forget_token(job_id)
            if report:
                report.failed.append(job_id)
        if not moved:
            return


def after_end(db: Database, queue: JobQueue, job_id: str) -> None:
    """What follows a job's move, once it is committed: its queue entry, its children, its hub token."""
    with db.read() as session:
        row = repository.get(session, job_id)
        if row is None:
            return
        status = row.status
        startable = status == "queued" and repository.is_ready(session, row)
        children = repository.ready_to_run(session, child_of=job_id) if status == "succeeded" else []
        fields = repository.queue_fields(session, children)
    if startable:
        queue.enqueue_soon(job_id, row.spec)
    for child in children:
        queue.enqueue_soon(child, fields[child])
    if status in ("failed", "cancelled"):
        fail_orphans(db, queue)
    if status in ("succeeded", "failed", "cancelled"):
        queue.forget_token(job_id)


_OF_JOB = re.compile(r"\.?(job_[0-9a-f]{24})(?:\.([0-9a-f]{8}))?(?:\.\d+\.(?:tmp|old))?")
_IN_CHECKPOINTS = (".staging.*", ".checkpoint-*.old", ".checkpoint-*.tmp")  # as worker.trainer and worker.files write


def compare_disk(db: Database, settings: Settings, report: Report, *, store: bool = True) -> None:
    """Remove what ended runs left half-made or unused; tell of adapters without a folder and folders without a job.

    The folders are listed before SQL is asked: what is in the list belongs to a run that had begun by then, so a job
    that is in a final state has no live run that could have made it, nor has any run but the job's present one.
    """
    storage = open_storage(settings)
    here = Storage(settings.data_dir)
    store = store and storage.remote
    roots = [here, storage] if store else [here]
    found = [(root, *one) for root in roots for one in _leftovers(root)]
    if store:
        adapters = {f"adapters/{name}" for name in storage.names("adapters")}
        storage.forget_deleted("files")
    folders = [name for name in here.names("jobs") if _OF_JOB.fullmatch(name)]
    ids = {job_id for _, _, job_id, _ in found} | set(folders)
    jobs: dict[str, tuple[str, str]] = {}
    final: dict[str, str] = {}  # the run that finished a job
    kept: set[str] = set()  # names of adapters' folders that have a row
    listed: set[str] = set()  # exports with artifacts, be it that their push failed
    with db.read() as session:
        for some in _chunks(sorted(ids)):
            query = select(JobRow.id, JobRow.status, JobRow.run_id).where(JobRow.id.in_(some))
            jobs |= {job_id: (status, run_id or "") for job_id, status, run_id in session.execute(query)}
            ended = select(RunRow.job_id, RunRow.id).where(RunRow.job_id.in_(some), RunRow.outcome.in_(FINAL))
            final |= {job_id: run_id for job_id, run_id in session.execute(ended)}
            listed |= set(session.scalars(select(ArtifactRow.job_id).where(ArtifactRow.job_id.in_(some)).distinct()))
        for name, where in session.execute(select(AdapterRow.name, AdapterRow.path).where(AdapterRow.ready)):
            kept.add(Path(where or "").name)
            if store:  # one that came after the listing is asked for by itself
                there = where in adapters or bool(storage.files(where or ""))
            else:
                there = storage.remote or Path(where or "").is_dir()
            if not there:
                report.missing.append(name)
    for root, key, job_id, run in found:
        if job_id not in jobs:
            report.unknown.append(Path(root.address(key)))
            continue
        status, run_id = jobs[job_id]
        folder = key.removeprefix("exports/")
        is_export = folder in (job_id, storage.own_key(job_id, final.get(job_id)))
        used = key.rpartition("/")[2] in kept or (is_export and (status == "succeeded" or job_id in listed))
        over = status in FINAL or (run is not None and not run_id.endswith(run))
        if over and not used:
            root.remove(key)
            report.swept.append(Path(root.address(key)))
    report.unknown += [here.place(f"jobs/{name}") for name in folders if name not in jobs]
    if storage.remote:  # what a run left that was killed; one that is just ending stores its log
        before = time.time() - _SCRATCH_SECONDS
        for key in (f"jobs/{name}" for name in folders if name in jobs and jobs[name][0] in FINAL):
            if here.modified(key) < before:
                here.remove(key)
                report.swept.append(here.place(key))
    drop_unfinished(settings)


def _leftovers(root: Storage) -> Iterable[tuple[str, str, str | None]]:
    """What a run may have left: (key, job, last digits of the run's id where the name has them)."""
    for folder in ("adapters", "exports"):
        for name in root.names(folder):
            if match := _OF_JOB.fullmatch(name):
                yield f"{folder}/{name}", match[1], match[2]
    if root.remote:
        return  # checkpoints are stored whole; `lorry prune` looks for those without a row
    for pattern in _IN_CHECKPOINTS:
        for path in (root.root / "jobs").glob(f"*/checkpoints/{pattern}"):
            yield path.relative_to(root.root).as_posix(), path.parent.parent.name, None


def _chunks(ids: list[str]) -> Iterable[list[str]]:
    return (ids[n : n + _CHUNK] for n in range(0, len(ids), _CHUNK))


def tell(watch: Watch, report: Report) -> None:
    """Log what was swept, and each thing that is missing or unknown once."""
    for path in report.swept:
        log.info("removed what an ended run left: %s", path)
    for name in set(report.missing) - watch.told:
        log.error("the folder of adapter %s is gone; delete the adapter or restore it from a backup", name)
    for path in set(report.unknown) - watch.told:
        log.warning("no job in the database belongs to %s; it is left as it is", path)
    watch.told = {*report.missing, *report.unknown}
