"""run_job(id): claim, recipe, finish. The one place where a job's outcome is decided and stored.

This module is loaded in the forked child before torch; the recipes bring torch with them when they are imported.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import importlib
import logging
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any, Literal

from sqlalchemy import update
from sqlalchemy.orm import Session

from service.adapters import service as adapters
from service.db import Database
from service.errors import JobFailure, NotFound
from service.files import service as files
from service.ids import new_id
from service.jobs import repository
from service.jobs.repository import Fenced
from service.jobs.states import Status
from service.logs import hide, job_log, redact, run_started, tail
from service.models import AdapterRow, ArtifactRow, FileRow, JobRow, RunRow
from service.queue import JobQueue
from service.reconcile import after_end
from service.settings import Settings
from service.specs import CptSpec, ExportSpec, IftSpec, parse_spec
from service.storage import Storage, StorageUnavailable, open_storage
from worker.devices import take_devices
from worker.gpu_share import GpuShare, owner_of_child
from worker.outcome import Context, Interrupted, Outcome, Paths
from worker.progress import SqlProgress, finite, persist
from worker.workspace import Workspace

log = logging.getLogger("lorry.worker")
# What torch, safetensors and SQLite say in exceptions that are no MemoryError and no OSError.
OUT_OF_MEMORY = ("can't allocate memory", "CUDA out of memory")
DISK_FULL = ("No space left on device", "database or disk is full", "PytorchStreamWriter failed", ". unexpected pos ")
STORAGE_SECONDS = 120.0  # how long a run waits for an object store that fails
WORKER_PID = "LORRY_WORKER_PID"  # set by the RQ parent
RECIPES = {"cpt": "worker.cpt", "ift": "worker.ift", "export": "worker.export.job"}


def run_job(job_id: str) -> None:
    """Run one attempt at a job, in the child that RQ forked for it. Outcomes go to SQL; nothing is raised."""
    settings = Settings()
    db, queue = Database(settings.sqlalchemy_url), JobQueue(settings.redis_url, settings.queue)
    run_id = new_id("run")
    with db.write() as session:
        row = repository.claim(session, job_id, run_id, owner_of_child())
    if row is None:
        return  # cancelled, done, or taken by another worker: a queue entry is only a hint
    try:
        try:
            attempt(db, queue, settings, row, run_id)
        except OSError as error:  # the log could not be opened or closed: the disk of the data folder is full, or away
            fail(db, settings, row, run_id, classify(error))
    except Fenced:
        log.error("job %s belongs to another run now; nothing more is written", job_id)
        return
    after_end(db, queue, job_id)


def attempt(db: Database, queue: JobQueue, settings: Settings, row: JobRow, run_id: str) -> None:
    """One run, with its log, from the claim to its stored outcome. Raises Fenced, and OSError if there can be no log."""
    run_dir = settings.job_dir(row.id)
    run_dir.mkdir(parents=True, exist_ok=True)
    storage = open_storage(settings, patience=STORAGE_SECONDS)
    workspace = Workspace(storage, settings, row.id, run_id)
    progress = SqlProgress(db, settings, row.id, run_id, workspace)
    share = GpuShare(settings, owner_of_child(), progress.eta)
    progress.on_phase = share.before
    about = {"job": row.id, "attempt": row.attempt, "run": run_id}
    with job_log(run_dir / "log.txt", **about), stop_on_signal(progress):
        log.info("%s", run_started(row.id, row.attempt, run_id))
        try:
            with progress, workspace, share:
                outcome = execute(db, queue, settings, row, progress, workspace)
            finish(db, settings, row, run_id, outcome)
        except Interrupted as interrupted:
            finish(db, settings, row, run_id, Outcome(interrupted.ask))
        except Fenced:
            raise
        except BaseException as error:
            log.exception("the run failed")
            fail(db, settings, row, run_id, classify(error))
    workspace.leave()  # once the log is closed


def execute(
    db: Database, queue: JobQueue, settings: Settings, row: JobRow, progress: SqlProgress, workspace: Workspace
) -> Outcome:
    """Resolve what the spec names to paths, run its recipe, and store what it has made."""
    storage = workspace.storage
    spec = parse_spec(row.spec)
    progress.phase("starting")
    devices = take_devices(spec, settings)
    prepare_process(settings)
    token = hub_token(queue, row.id)
    if spec.push_to_hub:
        importlib.import_module("worker.push").prepare(spec.push_to_hub, token, progress, settings.job_dir(row.id))
    if row.kind != "export" and len(devices) < 2:
        importlib.import_module("unsloth")  # before transformers, trl and peft, which it patches
    if len(devices) < 2:  # of several, each process limits itself
        limit_gpu(settings)
    from worker.base_model import resolve

    with db.read() as session:
        parent = parent_of(session, storage, spec)
        file = upload_of(session, spec, "file_id")
        eval_file = upload_of(session, spec, "eval_file_id")
        rows = repository.checkpoints(session, row.id)
    base_name = parent.base if isinstance(spec, ExportSpec) and parent else spec.model.name  # type: ignore[union-attr]
    base = resolve(base_name or settings.base_model, settings)
    # An adapter's folder is its run's own: a run that was taken for dead and wakes up cannot touch what its successor made.
    exports, ours = settings.exports_dir / row.id, settings.adapters_dir / f"{row.id}.{progress.run_id[-8:]}"
    if storage.remote:
        progress.phase("fetching")
    paths = Paths(
        run_dir=workspace.run_dir,
        out_dir=(exports if isinstance(spec, ExportSpec) else ours).absolute(),
        base=base,
        file=workspace.use(file, "invalid_data", "dataset.file_id: the file's bytes are gone"),
        eval_file=workspace.use(eval_file, "invalid_data", "dataset.eval_file_id: the file's bytes are gone"),
        parent=workspace.use(parent.path if parent else None, "adapter_not_found", "the files of its adapter are gone"),
    )
    workspace.take_up(rows)
    paths.out_dir.parent.mkdir(parents=True, exist_ok=True)
    revision = None if isinstance(spec, ExportSpec) else spec.model.revision
    about = {
        "base": base_name,
        "revision": revision,
        "kind": row.kind,
        "job": row.id,
        "name": row.adapter,
        "lineage": row.lineage,
    }
    context = Context(paths=paths, progress=progress, settings=settings, about=about, token=token)
    several = len(devices) > 1
    recipe = importlib.import_module("worker.launch" if several else RECIPES[row.kind])
    # What was imported stays. Without this each full collection, of which Unsloth asks for many, walks half a million
    # objects and holds the interpreter meanwhile, and the heartbeat with it.
    gc.freeze()
    if not isinstance(spec, ExportSpec):
        spec = importlib.import_module("worker.auto_batch").settle_batch(spec, context)
    outcome: Outcome = recipe.run(spec, context, devices) if several else recipe.run(spec, context)
    if storage.remote and outcome.ended == "done":
        progress.phase("storing")
    workspace.keep_result(outcome, paths.out_dir, row.kind)
    return outcome


def upload_of(
    session: Session, spec: CptSpec | IftSpec | ExportSpec, name: Literal["file_id", "eval_file_id"]
) -> str | None:
    """Where in the data root an upload that the spec names lies. Raises JobFailure."""
    file_id = None if isinstance(spec, ExportSpec) else getattr(spec.dataset, name)
    if file_id is None:
        return None
    row = session.get(FileRow, file_id)
    if row is None:
        raise JobFailure("invalid_data", f"dataset.{name}: no file {file_id}")
    return files.file_key(row)


def parent_of(session: Session, storage: Storage, spec: CptSpec | IftSpec | ExportSpec) -> adapters.Resolved | None:
    """The adapter that an ift starts from or that an export exports. Raises JobFailure."""
    ref = (
        spec.init.adapter
        if isinstance(spec, IftSpec) and spec.init
        else spec.adapter
        if isinstance(spec, ExportSpec)
        else None
    )
    if ref is None:
        return None
    try:
        return adapters.resolve(session, storage, ref)
    except NotFound as error:
        raise JobFailure("adapter_not_found", error.message) from error


def hub_token(queue: JobQueue, job_id: str) -> str | None:
    """The token sent with the job, else the server's own. A queue out of reach counts as none sent."""
    with contextlib.suppress(Exception):
        token = queue.token(job_id)
        if token:
            hide(token)
            return token
    return os.environ.get("HF_TOKEN") or None


ENDS: dict[str, tuple[Status, str]] = {
    "cancel": ("cancelled", "cancelled by a client"),
    "pause": ("paused", "paused by a client"),
    "stop": ("queued", "its worker was told to stop"),
}


def finish(db: Database, settings: Settings, row: JobRow, run_id: str, outcome: Outcome) -> None:
    """Store how a run ended, with its adapter and artifacts, in one transaction. Raises Fenced."""
    failure = outcome.failure
    lines = tail(settings.job_dir(row.id) / "log.txt", run_id) if failure else []

    def write(session: Session) -> Status | None:
        if outcome.ended != "done":
            to, reason = ENDS[outcome.ended]
            return repository.end_run(session, row.id, run_id, to, reason=reason)
        repository.own(session, row.id, run_id)  # raises Fenced
        if row.kind != "export":  # first: a job that fails takes an adapter that is not ready with it
            values = {**finite(outcome.adapter), "ready": True}
            session.execute(update(AdapterRow).where(AdapterRow.job_id == row.id).values(**values))
        for artifact in outcome.artifacts:
            session.merge(ArtifactRow(job_id=row.id, **artifact))
        result = finite(outcome.result)
        if failure is None:
            return repository.end_run(session, row.id, run_id, "succeeded", result=result)
        keep_log(session, run_id, lines)
        error = {**failure.body(), "message": redact(failure.message)}
        return repository.end_run(
            session, row.id, run_id, "failed", reason=error["message"], error=error, result=result
        )

    if persist(db, write) is None:
        raise Fenced(row.id)


def fail(db: Database, settings: Settings, row: JobRow, run_id: str, failure: JobFailure) -> None:
    """Store a failure: for good, or back to the queue if another attempt may help and one is left. Raises Fenced."""
    failure.message = redact(failure.message)
    error = failure.body()
    lines = tail(settings.job_dir(row.id) / "log.txt", run_id)
    again = failure.retry and row.attempt < settings.max_attempts
    if failure.retry and not again:
        error["message"] = f"attempt {row.attempt} of {settings.max_attempts}: {failure.message}"

    def write(session: Session) -> Status | None:
        keep_log(session, run_id, lines)
        if again:
            return repository.end_run(
                session, row.id, run_id, "queued", reason=failure.message, attempt=row.attempt + 1
            )
        return repository.end_run(session, row.id, run_id, "failed", reason=failure.message, error=error)

    if persist(db, write) is None:
        raise Fenced(row.id)


def keep_log(session: Session, run_id: str, lines: list[str]) -> None:
    """Put the end of a failed run's log in its record."""
    run = session.get(RunRow, run_id)
    if run is not None:
        run.record = {**run.record, "log_tail": lines}


def classify(error: BaseException) -> JobFailure:
    """The JobFailure that an exception amounts to. What is nobody's fault may be tried again."""
    if isinstance(error, JobFailure):
        return error
    text = str(error)
    first = text.splitlines()[0] if text else ""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or _says(text, OUT_OF_MEMORY):
        advice = "use a smaller per_device_train_batch_size or max_seq_length"
        return JobFailure("out_of_memory", f"{advice}: {first or 'no memory left'}")
    if (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)) or _says(text, DISK_FULL):
        return JobFailure("insufficient_storage", f"the disk of the data folder is full: {first}")
    if isinstance(error, StorageUnavailable):
        return JobFailure("storage_unavailable", error.message, retry=True)
    return JobFailure("internal_error", f"{type(error).__name__}: {first}", retry=True)


def _says(text: str, signs: tuple[str, ...]) -> bool:
    return any(sign in text for sign in signs)


def prepare_process(settings: Settings) -> None:
    """What must be set before torch and the hub libraries are imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "")  # off but where worker/data/threads.py has it on
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str((settings.data_dir / "unsloth_compiled_cache").absolute()))
    if settings.torch_threads:
        os.environ["OMP_NUM_THREADS"] = str(settings.torch_threads)
        os.environ["RAYON_NUM_THREADS"] = str(settings.torch_threads)  # the tokenizers library's
        import torch

        torch.set_num_threads(settings.torch_threads)


def limit_gpu(settings: Settings) -> None:
    """Keep this process within LORRY_TRAIN_MEMORY_FRACTION of its GPU."""
    if settings.train_memory_fraction < 1:
        import torch

        if torch.cuda.is_available():
            torch.cuda.set_per_process_memory_fraction(settings.train_memory_fraction)


@contextlib.contextmanager
def stop_on_signal(progress: SqlProgress) -> Iterator[None]:
    """SIGUSR1 (from the worker) and the worker's own death ask the run to checkpoint and go back to the queue."""

    def stop(*_: Any) -> None:
        progress.stopping = True

    previous = signal.signal(signal.SIGUSR1, stop)
    if sys.platform == "linux":
        parent = int(os.environ.get(WORKER_PID) or os.getppid())  # the worker may have died before this line
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGUSR1)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            progress.stopping = True
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, previous)
