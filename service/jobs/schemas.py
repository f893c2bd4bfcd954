"""Jobs on the wire."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from service.jobs.states import Status
from service.models import ArtifactRow, CheckpointRow, EventRow, JobRow, RunRow

Kind = Literal["cpt", "ift", "export"]


class Progress(BaseModel):
    model_config = ConfigDict(extra="allow")

    step: int | None = Field(None, description="Optimiser steps done.")
    total_steps: int | None = Field(None, description="Optimiser steps in all.")
    epoch: float | None = Field(None, description="Passes over the data done.")
    tokens: int | None = Field(None, description="Tokens trained on so far, padding not counted.")
    tokens_per_second: float | None = Field(None, description="Tokens per second over the last steps.")
    eta_seconds: float | None = Field(None, description="Estimated time to the end, in seconds.")
    phase: str | None = Field(None, description="What is being done: data, model, training, saving, verifying, …")


class JobError(BaseModel):
    model_config = ConfigDict(extra="allow")

    code: str = Field(description="e.g. invalid_data, model_not_found, out_of_memory, worker_lost, parent_failed.")
    message: str = Field(description="What went wrong.")
    rows: list[dict[str, Any]] = Field(default_factory=list, description="invalid_data: up to 100 {row, reason}.")


class Lineage(BaseModel):
    model_config = ConfigDict(extra="allow")

    base: str | None = Field(None, description="Base model at the root.")
    parent: str | None = Field(None, description="Adapter (or name@step) this job starts from.")
    jobs: list[str] = Field(default_factory=list, description="Jobs that led to the parent, oldest first.")


class Run(BaseModel):
    """One attempt."""

    attempt: int = Field(description="Counts from 1.")
    worker: str = Field(description="Who ran it.")
    outcome: str | None = Field(description="State the run ended with (queued: another attempt follows); null if live.")
    reason: str | None = Field(description="Why it ended so.")
    record: dict[str, Any] = Field(description="Parameters, data fingerprint, versions, device, optimiser groups.")
    started_at: int = Field(description="Unix seconds.")
    finished_at: int | None = Field(description="Unix seconds.")


class Job(BaseModel):
    id: str = Field(description="job_…; sorts by creation.")
    object: Literal["job"] = Field("job", description="Always 'job'.")
    kind: Kind = Field(description="cpt, ift or export.")
    status: Status = Field(description="State; succeeded, failed and cancelled are final.")
    adapter: str = Field(description="Adapter the job makes (export: the one it exports).")
    attempt: int = Field(description="Attempt under way or last made; counts from 1.")
    control: Literal["pause", "cancel"] | None = Field(description="What a live run has been asked to do.")
    spec: dict[str, Any] = Field(description="The spec with every default filled in.")
    progress: Progress = Field(description="How far it is.")
    result: dict[str, Any] = Field(description="What came out, e.g. eval_loss at start and end.")
    error: JobError | None = Field(description="Why it failed.")
    after: list[str] = Field(description="Jobs that must succeed first.")
    lineage: Lineage = Field(description="Where the adapter comes from.")
    created_at: int = Field(description="Unix seconds.")
    started_at: int | None = Field(description="Start of the first run, in Unix seconds.")
    finished_at: int | None = Field(description="Unix seconds.")


class Place(BaseModel):
    name: str = Field(description="Name of the queue, as in /metrics.")
    workers: int | None = Field(
        description="Workers that take jobs from it; with 0 the job waits until one is started. "
        "null: the queue server is out of reach."
    )


class JobDetail(Job):
    queue: Place | None = Field(description="Where a queued job waits; null for all others.")
    runs: list[Run] = Field(description="Every attempt, oldest first.")


class Event(BaseModel):
    id: int = Field(description="Counts from 1 within the job; what Last-Event-ID takes.")
    type: str = Field(description="status, progress, metrics, checkpoint or log.")
    data: dict[str, Any] = Field(description="Its content.")
    created_at: int = Field(description="Unix seconds.")


class Metrics(BaseModel):
    train: list[dict[str, Any]] = Field(
        description="Points in order of steps: step, epoch, loss, learning_rate, embedding_learning_rate, grad_norm, "
        "tokens_per_second, tokens, memory_bytes."
    )
    eval: list[dict[str, Any]] = Field(description="Points in order of steps: step, epoch, eval_loss.")


class Checkpoint(BaseModel):
    step: int = Field(description="Optimiser step it was written at.")
    loss: float | None = Field(description="Training loss at that step, in nats per token.")
    eval_loss: float | None = Field(description="Evaluation loss at that step, in nats per token.")
    bytes: int = Field(description="Size on disk.")
    adapter: str = Field(description="Name under which it is served, e.g. in /generate.")
    created_at: int = Field(description="Unix seconds.")


class Artifact(BaseModel):
    path: str = Field(description="Relative to the export; append it to …/artifacts/ to download.")
    bytes: int = Field(description="Size, in bytes.")
    sha256: str = Field(description="SHA-256, in hex.")


def job(row: JobRow) -> dict[str, Any]:
    """The row in Job's shape; the endpoint's response model checks it."""
    return {
        "id": row.id,
        "kind": row.kind,
        "status": row.status,
        "adapter": row.adapter,
        "attempt": row.attempt,
        "control": row.control,
        "spec": row.spec,
        "progress": row.progress,
        "result": row.result,
        "error": row.error,
        "after": row.after,
        "lineage": row.lineage,
        "created_at": int(row.created_at),
        "started_at": _seconds(row.started_at),
        "finished_at": _seconds(row.finished_at),
    }


def detail(row: JobRow, runs: Iterable[RunRow], place: tuple[str, int | None] | None) -> dict[str, Any]:
    """`place`: name of the job's queue and number of its workers, if it waits there."""
    queue = {"name": place[0], "workers": place[1]} if place else None
    return {**job(row), "queue": queue, "runs": [_run(r) for r in runs]}


def _run(row: RunRow) -> dict[str, Any]:
    return {
        "attempt": row.attempt,
        "worker": row.worker,
        "outcome": row.outcome,
        "reason": row.reason,
        "record": row.record,
        "started_at": int(row.started_at),
        "finished_at": _seconds(row.finished_at),
    }


def event(row: EventRow) -> dict[str, Any]:
    return {"id": row.seq, "type": row.type, "data": row.data, "created_at": int(row.created_at)}


def checkpoint(row: CheckpointRow, name: str) -> Checkpoint:
    return Checkpoint(
        step=row.step,
        loss=row.loss,
        eval_loss=row.eval_loss,
        bytes=row.bytes,
        adapter=f"{name}@{row.step}",
        created_at=int(row.created_at),
    )


def artifact(row: ArtifactRow) -> Artifact:
    return Artifact(path=row.path, bytes=row.bytes, sha256=row.sha256)


def _seconds(time: float | None) -> int | None:
    return None if time is None else int(time)
