"""/v1/jobs: from POST to the last event."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, Header, Path, Query, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.responses import PlainTextResponse, StreamingResponse

from service.deps import DbDep, DryRunsDep, QueueDep, SettingsDep
from service.disconnect import ClientGone, unless_gone
from service.errors import Conflict, Invalid, NotFound
from service.files.download import Download
from service.jobs import repository, schemas, service
from service.jobs.dry_run_schemas import DryRun
from service.jobs.events import EventHub
from service.jobs.states import FINAL, Status
from service.jobs.tar import Tar
from service.json_body import Storable
from service.specs import CptSpec, ExportSpec, IftSpec
from service.sse import EventStream
from service.storage import open_storage
from service.wire import After, IdempotencyKey, Limit, Page

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])
JobId = Annotated[str, Path(description="Id of a job, job_….")]
AnyJob = Annotated[CptSpec | IftSpec | ExportSpec, Body(discriminator="kind", description="One of the three specs.")]
HubToken = Annotated[
    str | None,
    Header(min_length=1, max_length=512, description="Hub token, held only until the job ends and never shown."),
]
Seq = Annotated[int, Query(ge=0, le=2**31 - 1, description="Only events after this one.")]


@router.post("", status_code=202, response_model=schemas.Job, dependencies=[Storable], summary="Make a job")
def create(
    spec: AnyJob,
    response: Response,
    db: DbDep,
    queue: QueueDep,
    settings: SettingsDep,
    idempotency_key: IdempotencyKey = None,
    x_hf_token: HubToken = None,
) -> Any:
    """The job is stored before the answer; `Location` is its address. `after` queues it behind other jobs."""
    row, found = service.create(db, queue, settings, spec, key=idempotency_key, token=x_hf_token)
    response.headers["Location"] = f"/v1/jobs/{row.id}"
    if found:
        response.headers["Idempotent-Replayed"] = "true"
    return schemas.job(row)


@router.post("/dry-run", response_model=DryRun, dependencies=[Storable], summary="Say what a job would do")
async def dry_run(spec: AnyJob, request: Request, db: DbDep, runs: DryRunsDep, x_hf_token: HubToken = None) -> Any:
    """The body and the refusals are those of POST /v1/jobs; nothing is stored, no name taken, nothing started.

    The data is read and checked as the job would: what the job would fail with is in `error`, malformed rows by number.
    503 `dry_run_unavailable` where this API's host has no training packages. A client that leaves ends it.
    """
    try:
        return await unless_gone(request, runs.report(db, spec, x_hf_token))
    except ClientGone:
        return Response(status_code=499)


@router.get("", response_model=Page[schemas.Job], summary="List jobs")
def index(
    db: DbDep,
    kind: Annotated[schemas.Kind | None, Query(description="Only jobs of this kind.")] = None,
    status: Annotated[Status | None, Query(description="Only jobs in this state.")] = None,
    limit: Limit = 20,
    after: After = None,
) -> Any:
    """Newest first."""
    with db.read() as session:
        rows, more = repository.list_page(session, kind=kind, status=status, limit=limit, after=after)
    data = [schemas.job(r) for r in rows]
    return {"data": data, "has_more": more, "next": rows[-1].id if more else None}


@router.get("/{job_id}", response_model=schemas.JobDetail, summary="One job, with its runs")
def show(job_id: JobId, db: DbDep, queue: QueueDep) -> Any:
    with db.read() as session:
        row = service.require(session, job_id)
        runs = repository.runs(session, job_id)
    return schemas.detail(row, runs, queue.place(row.spec) if row.status == "queued" else None)


@router.post("/{job_id}/cancel", response_model=schemas.Job, summary="Cancel a job")
def cancel(job_id: JobId, response: Response, db: DbDep, queue: QueueDep) -> Any:
    """200 if it was waiting and is cancelled now; 202 if its run was asked to write a checkpoint and end."""
    row, done = service.cancel(db, queue, job_id)
    response.status_code = 200 if done else 202
    return schemas.job(row)


@router.post("/{job_id}/pause", response_model=schemas.Job, summary="Pause a job")
def pause(job_id: JobId, response: Response, db: DbDep, queue: QueueDep) -> Any:
    """200 if it was waiting and is paused now; 202 if its run was asked to write a checkpoint and pause."""
    row, done = service.pause(db, queue, job_id)
    response.status_code = 200 if done else 202
    return schemas.job(row)


@router.post("/{job_id}/resume", response_model=schemas.Job, summary="Resume a paused job")
def resume(job_id: JobId, db: DbDep, queue: QueueDep) -> Any:
    """Queues it again; it goes on from its last checkpoint."""
    return schemas.job(service.resume(db, queue, job_id))


_EVENTS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Server-sent events (event: the type, id: the event's id, data: JSON), or a page of them.",
        "content": {"text/event-stream": {"schema": {"type": "string", "description": "The stream."}}},
    },
    204: {"description": "The job is in a final state and Last-Event-ID was its last event: nothing will follow."},
}


@router.get("/{job_id}/events", response_model=Page[schemas.Event], responses=_EVENTS, summary="Follow a job")
async def events(
    job_id: JobId,
    request: Request,
    db: DbDep,
    settings: SettingsDep,
    accept: Annotated[str, Header(description="application/json gives a page, anything else a stream.")] = "*/*",
    last_event_id: Annotated[
        str | None, Header(max_length=20, description="Resume a stream after this event's id.")
    ] = None,
    after: Seq = 0,
    limit: Annotated[int, Query(ge=1, le=1000, description="At most this many events a page.")] = 100,
) -> Any:
    """The stream ends with the event of a final state. `after` does what Last-Event-ID does."""
    if last_event_id is not None:
        if not (last_event_id.isascii() and last_event_id.isdecimal() and int(last_event_id) < 2**31):
            raise Invalid("Last-Event-ID: the id of an event, a whole number", param="Last-Event-ID")
        after = int(last_event_id)
    if "application/json" in accept and "text/event-stream" not in accept:
        return await run_in_threadpool(_page, db, job_id, after, limit)
    status, head = await run_in_threadpool(_head, db, job_id)
    if after > head:
        raise Invalid(f"Last-Event-ID: the job's newest event is {head}", param="Last-Event-ID")
    if status in FINAL and after == head:
        return Response(status_code=204)  # tells a browser's EventSource not to come again
    hub: EventHub = request.app.state.events
    return EventStream(hub.stream(job_id, after, ended=status in FINAL), ping=settings.sse_ping_seconds)


def _head(db: Any, job_id: str) -> tuple[str, int]:
    with db.read() as session:
        row = service.require(session, job_id)
        return row.status, row.event_seq


def _page(db: Any, job_id: str, after: int, limit: int) -> dict[str, Any]:
    with db.read() as session:
        service.require(session, job_id)
        rows = repository.events_after(session, job_id, after, limit + 1)
    data = [schemas.event(r) for r in rows[:limit]]
    more = len(rows) > limit
    return {"data": data, "has_more": more, "next": str(data[-1]["id"]) if more else None}


@router.get("/{job_id}/metrics", response_model=schemas.Metrics, summary="Series of a training job")
def metrics(job_id: JobId, db: DbDep) -> Any:
    with db.read() as session:
        service.require(session, job_id)
        return repository.metrics(session, job_id)


@router.get("/{job_id}/checkpoints", response_model=Page[schemas.Checkpoint], summary="Checkpoints on disk")
def checkpoints(job_id: JobId, db: DbDep) -> Page[schemas.Checkpoint]:
    """In order of steps."""
    with db.read() as session:
        service.require(session, job_id)
        rows = repository.checkpoints(session, job_id)
        name = repository.adapter_name(session, job_id) or job_id
    return Page(data=[schemas.checkpoint(r, name) for r in rows], has_more=False)


@router.get(
    "/{job_id}/log",
    summary="End of a job's log",
    response_class=PlainTextResponse,
    responses={200: {"content": {"text/plain": {}}, "description": "The log's last bytes, whole lines."}},
)
def log(
    job_id: JobId,
    db: DbDep,
    settings: SettingsDep,
    bytes: Annotated[int, Query(ge=1, le=4 * 2**20, description="At most this many bytes from the end.")] = 64 * 1024,
) -> PlainTextResponse:
    """What the job's process and its libraries printed, all attempts; empty before the first one.

    If the file is gone (LORRY_KEEP_LOGS_DAYS), the last 200 lines of a run that failed. No secret is in it.
    """
    with db.read() as session:
        service.require(session, job_id)
    return PlainTextResponse(service.log_tail(db, settings, job_id, bytes), headers={"Cache-Control": "no-store"})


@router.get("/{job_id}/artifacts", response_model=Page[schemas.Artifact], summary="Files of an export")
def artifacts(job_id: JobId, db: DbDep) -> Page[schemas.Artifact]:
    with db.read() as session:
        service.require(session, job_id)
        rows = repository.artifacts(session, job_id)
    return Page(data=[schemas.artifact(r) for r in rows], has_more=False)


_TAR: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/x-tar": {}}, "description": "The archive; its Content-Length is known at once."},
    206: {"content": {"application/x-tar": {}}, "description": "The range of it that was asked for."},
}


@router.head("/{job_id}/artifacts.tar", include_in_schema=False)
@router.get(
    "/{job_id}/artifacts.tar", summary="Download a whole export", response_class=StreamingResponse, responses=_TAR
)
def artifacts_tar(
    job_id: JobId,
    request: Request,
    db: DbDep,
    settings: SettingsDep,
    range: Annotated[str | None, Header(description="One range of bytes.")] = None,
    if_range: Annotated[str | None, Header(description="An ETag: the range only if it is still that archive.")] = None,
) -> StreamingResponse:
    """All files that …/artifacts lists, under one folder, in order of their paths. The same export gives the same bytes,
    so that a download that broke off can go on by Range."""
    with db.read() as session:
        row = service.require(session, job_id)
        rows = repository.artifacts(session, job_id)
        run_id = repository.final_run(session, job_id)
    if not rows and row.kind == "export" and row.status not in FINAL:
        raise Conflict(f"job {job_id} is {row.status}: it has no artifacts yet", code="job_not_finished")
    if not rows:
        raise NotFound(f"job {job_id} has no artifacts", code="artifact_not_found")
    # Named by what does not change: the adapter may be renamed between two parts of a download.
    storage = open_storage(settings)
    folder = storage.own_key(f"exports/{job_id}", run_id)
    tar = Tar(storage, folder, rows, name=job_id, mtime=int(row.finished_at or row.created_at))
    return tar.answer(f"{job_id}.tar", range=range, if_range=if_range, head=request.method == "HEAD")


@router.head("/{job_id}/artifacts/{path:path}", include_in_schema=False)
@router.get("/{job_id}/artifacts/{path:path}", summary="Download a file of an export", response_class=Response)
def artifact(
    job_id: JobId,
    path: Annotated[str, Path(description="The file's path, as listed.")],
    db: DbDep,
    settings: SettingsDep,
) -> Download:
    """Understands Range and If-Range; the ETag is the SHA-256. Only listed files can be named."""
    with db.read() as session:
        service.require(session, job_id)
        run_id = repository.final_run(session, job_id)
        row = repository.artifact(session, job_id, path)
    if row is None:
        raise NotFound(f"job {job_id} has no artifact {path!r}", code="artifact_not_found")
    name = path.rsplit("/", 1)[-1]
    storage = open_storage(settings)
    key = f"{storage.own_key(f'exports/{job_id}', run_id)}/{row.path}"
    return Download.of(storage, key, filename=name, sha256=row.sha256)
