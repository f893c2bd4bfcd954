"""/v1/fine_tuning/jobs: OpenAI's calls, each one of the native calls on jobs in another form."""

from __future__ import annotations

import contextlib
import hashlib
import re
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request
from pydantic import BaseModel, Field

from service.adapters.service import resolve
from service.db import Database
from service.deps import DbDep, QueueDep, SettingsDep
from service.errors import Invalid, LorryError, NotFound
from service.fine_tuning import repository, schemas
from service.ids import new_id
from service.jobs import repository as jobs_repository
from service.jobs import service as jobs
from service.json_body import Storable
from service.models import JobRow
from service.settings import Settings
from service.specs import IftSpec
from service.storage import open_storage
from service.wire import After, IdempotencyKey, Limit

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["openai"])
JobId = Annotated[str, Path(max_length=64, description="The job's id.")]
_EVENT_ID = re.compile(r"ftevent-(?P<job>job_[0-9a-f]+)-(?P<seq>[0-9]{1,9})")
_METADATA = re.compile(r"metadata\[(.{1,64})\]")


class List(BaseModel):
    """OpenAI's list of jobs, events or checkpoints."""

    object: Literal["list"] = Field("list", description="Always 'list'.")
    data: list[dict[str, Any]] = Field(description="The page's items, newest first.")
    has_more: bool = Field(description="Whether more items follow.")
    first_id: str | None = Field(description="Id of the page's first item.")
    last_id: str | None = Field(description="Id of the page's last item: `after` for the next page.")


@router.post("", dependencies=[Storable], summary="Create a fine-tuning job")
def create(
    body: schemas.FineTuningRequest,
    db: DbDep,
    queue: QueueDep,
    settings: SettingsDep,
    idempotency_key: IdempotencyKey = None,
) -> dict[str, Any]:
    """Instruction tuning of a base model or of an adapter on rows of `messages`, trained on the answers alone.

    A message's `weight` 0 leaves an answer out. The job is one of /v1/jobs, too; its model is served under
    `fine_tuned_model` as soon as it succeeded.
    """
    # The same key gives the same name, and so the same spec: that is how jobs.create() knows the request again.
    tail = new_id("x")[-12:] if idempotency_key is None else hashlib.sha256(idempotency_key.encode()).hexdigest()[:12]
    spec = _spec(db, settings, body, tail)
    try:
        row, _ = jobs.create(db, queue, settings, spec, key=idempotency_key, token=None)
    except LorryError as error:
        raise _renamed(error) from error
    return schemas.job(row)


@router.get("", response_model=List, summary="List fine-tuning jobs")
def index(
    request: Request,
    db: DbDep,
    limit: Limit = 20,
    after: After = None,
) -> List:
    """Newest first, however they were made. `metadata[key]=value` narrows the list."""
    wanted = {found[1]: v for k, v in request.query_params.items() if (found := _METADATA.fullmatch(k))}
    with db.read() as session:
        rows, more = repository.list_page(session, limit=limit, after=after, metadata=wanted)
    return _list([schemas.job(row) for row in rows], more)


@router.get("/{job_id}", summary="One fine-tuning job")
def show(job_id: JobId, db: DbDep) -> dict[str, Any]:
    return schemas.job(_require(db, job_id))


@router.post("/{job_id}/cancel", summary="Cancel a fine-tuning job")
def cancel(job_id: JobId, db: DbDep, queue: QueueDep) -> dict[str, Any]:
    """A run that is under way writes a checkpoint and ends within a step; until then the status is what it was."""
    _require(db, job_id)
    return schemas.job(jobs.cancel(db, queue, job_id)[0])


@router.post("/{job_id}/pause", summary="Pause a fine-tuning job")
def pause(job_id: JobId, db: DbDep, queue: QueueDep) -> dict[str, Any]:
    _require(db, job_id)
    return schemas.job(jobs.pause(db, queue, job_id)[0])


@router.post("/{job_id}/resume", summary="Resume a paused fine-tuning job")
def resume(job_id: JobId, db: DbDep, queue: QueueDep) -> dict[str, Any]:
    _require(db, job_id)
    return schemas.job(jobs.resume(db, queue, job_id))


@router.get("/{job_id}/events", response_model=List, summary="Events of a fine-tuning job")
def events(
    job_id: JobId,
    db: DbDep,
    limit: Limit = 20,
    after: Annotated[str | None, Query(max_length=100, description="Id of the last event of the page before.")] = None,
) -> List:
    """Newest first. /v1/jobs/{id}/events streams them as they come."""
    _require(db, job_id)
    seq = None
    if after is not None:
        found = _EVENT_ID.fullmatch(after)
        if found is None or found["job"] != job_id:
            raise Invalid(f"after: {after!r} is no event of job {job_id}", param="after")
        seq = int(found["seq"])
    with db.read() as session:
        rows, more = repository.events_before(session, job_id, seq, limit)
    return _list([schemas.event(row) for row in rows], more)


@router.get("/{job_id}/checkpoints", response_model=List, summary="Checkpoints of a fine-tuning job")
def checkpoints(
    job_id: JobId,
    db: DbDep,
    limit: Limit = 10,
    after: Annotated[str | None, Query(max_length=100, description="Id of the last one of the page before.")] = None,
) -> List:
    """Newest first; each can be used as a `model`."""
    _require(db, job_id)
    with db.read() as session:
        rows = jobs_repository.checkpoints(session, job_id)
        name = jobs_repository.adapter_name(session, job_id) or job_id
    items = [schemas.checkpoint(row, name) for row in reversed(rows)]
    if after is not None:
        ids = [item["id"] for item in items]
        if after not in ids:
            raise Invalid(f"after: {after!r} is no checkpoint of job {job_id}", param="after")
        items = items[ids.index(after) + 1 :]
    return _list(items[:limit], len(items) > limit)


def _list(items: list[dict[str, Any]], more: bool) -> List:
    ends = (items[0]["id"], items[-1]["id"]) if items else (None, None)
    return List(data=items, has_more=more, first_id=ends[0], last_id=ends[1])


def _require(db: Database, job_id: str) -> JobRow:
    with db.read() as session:
        row = jobs.require(session, job_id)
    if row.kind not in repository.KINDS:
        raise NotFound(f"job {job_id} is no fine-tuning job but an {row.kind}", code="job_not_found")
    return row


def _spec(db: Database, settings: Settings, body: schemas.FineTuningRequest, tail: str) -> IftSpec:
    """The native spec; `tail` ends the name of what is made."""
    base, parent = body.model, None
    if body.model != settings.base_model:
        with db.read() as session, contextlib.suppress(NotFound):  # else a base's name, which jobs.create() looks at
            base, parent = resolve(session, open_storage(settings), body.model).base, body.model
    name = "-".join(filter(None, ("ft", body.suffix, tail)))
    return schemas.spec(body, name=name, base=base, parent=parent)


# Fields of the native spec, and what they are called in OpenAI's request.
_FIELDS = {
    "dataset.file_id": "training_file", "dataset.eval_file_id": "validation_file", "model.name": "model",
    "init.adapter": "model", "model": "model", "adapter": "suffix",
}  # fmt: skip


def _renamed(error: LorryError) -> LorryError:
    """The error with the field as this API's client knows it."""
    known = _FIELDS.get(error.param or "")
    if known is not None:
        error.message = f"{known}: {error.message.removeprefix(f'{error.param}: ')}"
        error.param = known
    return error
