"""Liveness, readiness by part, Prometheus."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Literal

import httpx
from fastapi import APIRouter, Query, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from pydantic import BaseModel, Field
from redis.exceptions import RedisError
from sqlalchemy.exc import SQLAlchemyError

from service.db import Database
from service.deps import DbDep, QueueDep, SettingsDep
from service.engine_client import is_asleep, name_of
from service.errors import Invalid
from service.jobs import repository
from service.migrate import is_current
from service.queue import JobQueue
from service.settings import Settings

router = APIRouter(tags=["health"])
PARTS = ("database", "queue", "workers", "engine")


class Alive(BaseModel):
    status: Literal["ok"] = Field("ok", description="Always 'ok'.")


class Part(BaseModel):
    ok: bool = Field(description="Whether this part can do its work.")
    detail: str = Field(description="What was seen.")


class Ready(BaseModel):
    ready: bool = Field(description="Whether all parts asked for are.")
    parts: dict[str, Part] = Field(description="database, queue, workers, engine.")


@router.head("/healthz", include_in_schema=False)
@router.get("/healthz", response_model=Alive, summary="Liveness")
async def healthz() -> Alive:
    """Answers as long as the process does; needs no key."""
    return Alive()


@router.get(
    "/readyz",
    response_model=Ready,
    summary="Readiness by part",
    responses={503: {"model": Ready, "description": "At least one part is not ready."}},
)
def readyz(
    response: Response,
    db: DbDep,
    queue: QueueDep,
    settings: SettingsDep,
    parts: Annotated[
        str, Query(max_length=64, description="Comma-separated parts that count: database, queue, workers, engine.")
    ] = ",".join(PARTS),
) -> Ready:
    """200 if every part is ready, else 503; needs no key."""
    asked = [p for p in parts.split(",") if p]
    if not asked or set(asked) - set(PARTS):
        raise Invalid(f"parts: any of {', '.join(PARTS)}", param="parts")
    checks = {
        "database": lambda: _database(settings, db),
        "queue": lambda: _queue(queue),
        "workers": lambda: _workers(queue),
        "engine": lambda: _engine(settings),
    }
    seen = {name: checks[name]() for name in asked}
    ready = all(part.ok for part in seen.values())
    response.status_code = 200 if ready else 503
    return Ready(ready=ready, parts=seen)


def _database(settings: Settings, db: Database) -> Part:
    kind = "SQLite" if db.sqlite else "Postgres"
    try:
        current = is_current(settings.sqlalchemy_url)
    except SQLAlchemyError as error:
        return Part(ok=False, detail=f"{kind}: out of reach ({type(error).__name__})")
    return Part(ok=current, detail=kind if current else f"{kind}: not at the newest migration; run `lorry migrate`")


def _queue(queue: JobQueue) -> Part:
    try:
        return Part(ok=True, detail=f"{queue.length()} waiting")
    except RedisError as error:
        return Part(ok=False, detail=f"out of reach ({type(error).__name__})")


def _workers(queue: JobQueue) -> Part:
    try:
        count, unheard = len(queue.worker_names()), queue.unheard()
    except RedisError as error:
        return Part(ok=False, detail=f"unknown: the queue is out of reach ({type(error).__name__})")
    if not count:
        return Part(ok=False, detail="none registered; start `lorry worker`")
    # Said, but no reason to be unready: else one job for a pool that nobody serves would take the service down.
    lonely = "".join(f"; none takes jobs from {name} ({length} waiting)" for name, length in unheard.items())
    return Part(ok=True, detail=f"{count} registered{lonely}")


def _engine(settings: Settings) -> Part:
    """Ready if one engine is; each is named if there are several."""
    urls = settings.engine_urls
    with ThreadPoolExecutor(len(urls)) as pool:
        parts = list(pool.map(_one_engine, urls))
    if len(parts) == 1:
        return parts[0]
    ready = sum(part.ok for part in parts)
    each = "; ".join(f"{name_of(url)}: {part.detail}" for url, part in zip(urls, parts, strict=True))
    return Part(ok=ready > 0, detail=f"{ready} of {len(parts)} ready: {each}")


def _one_engine(url: str) -> Part:
    try:
        answer = httpx.get(f"{url}/health", timeout=2, trust_env=False)
    except httpx.HTTPError as error:
        return Part(ok=False, detail=f"no answer ({type(error).__name__}); start `lorry engine`")
    if answer.is_success and is_asleep(answer):
        # Ready all the same: else each job would take the API, which answers 503 for this engine, out of a balancer.
        return Part(
            ok=True, detail=f"asleep while a job has its memory, for about {answer.json()['wakes_in_seconds']} s"
        )
    return Part(ok=answer.is_success, detail=f"status {answer.status_code}")


@router.get("/metrics", summary="Prometheus metrics", response_class=Response)
def metrics(request: Request) -> Response:
    """Text format: jobs by kind and state, queue length, HTTP latency by route, series of running jobs."""
    return Response(generate_latest(request.app.state.registry), media_type=CONTENT_TYPE_LATEST)


class JobsCollector(Collector):
    """Reads SQL and the queue at each scrape, so that every API process tells the same."""

    def __init__(self, registry: CollectorRegistry, db: Database, queue: JobQueue) -> None:
        self._db, self._queue = db, queue
        registry.register(self)

    def describe(self) -> list[Metric]:
        return []  # else registering would collect

    def collect(self) -> Iterator[Metric]:
        with self._db.read() as session:
            counts = repository.counts(session)
            live = [(row, repository.last_point(session, row.id)) for row in repository.active(session)]
        jobs = GaugeMetricFamily("lorry_jobs", "Jobs by kind and state.", labels=["kind", "status"])
        for kind, status, count in counts:
            jobs.add_metric([kind, status], count)
        yield jobs
        length = GaugeMetricFamily("lorry_queue_length", "Entries on a queue.", labels=["queue"])
        workers = GaugeMetricFamily("lorry_queue_workers", "Workers that take jobs from a queue.", labels=["queue"])
        try:
            lengths, heard = self._queue.lengths(), self._queue.workers()
            for name in sorted({*lengths, *heard}):
                length.add_metric([name], lengths.get(name, 0))
                workers.add_metric([name], heard.get(name, 0))
        except RedisError:
            pass  # no sample: unknown is not zero
        yield length
        yield workers
        labels = ["job", "kind", "adapter"]
        for name, text, key in (
            ("step", "Optimiser steps done by a running job.", "step"),
            ("total_steps", "Optimiser steps a running job will take.", "total_steps"),
            ("tokens_per_second", "Training speed of a running job, tokens per second.", "tokens_per_second"),
            ("loss", "Latest training loss of a running job, nats per token.", "loss"),
            ("eval_loss", "Latest evaluation loss of a running job, nats per token.", "eval_loss"),
        ):
            family = GaugeMetricFamily(f"lorry_job_{name}", text, labels=labels)
            for row, point in live:
                values: dict[str, Any] = {**point, **row.progress}
                if isinstance(values.get(key), (int, float)):
                    family.add_metric([row.id, row.kind, row.adapter], values[key])
            yield family
