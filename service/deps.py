"""What endpoints ask for by type: the parts that the lifespan put on app.state.

The functions are async although they wait for nothing: FastAPI sends others through its thread pool, one trip each.
"""

from __future__ import annotations

from typing import Annotated, cast

from fastapi import Depends, Request

from service.db import Database
from service.engines import Engines
from service.jobs.dry_run import DryRuns
from service.queue import JobQueue
from service.settings import Settings


async def _settings(request: Request) -> Settings:
    return cast(Settings, request.app.state.settings)


async def _db(request: Request) -> Database:
    return cast(Database, request.app.state.db)


async def _queue(request: Request) -> JobQueue:
    return cast(JobQueue, request.app.state.queue)


async def _engine(request: Request) -> Engines:
    return cast(Engines, request.app.state.engine)


async def _dry_runs(request: Request) -> DryRuns:
    return cast(DryRuns, request.app.state.dry_runs)


SettingsDep = Annotated[Settings, Depends(_settings)]
DbDep = Annotated[Database, Depends(_db)]
EngineDep = Annotated[Engines, Depends(_engine)]
QueueDep = Annotated[JobQueue, Depends(_queue)]
DryRunsDep = Annotated[DryRuns, Depends(_dry_runs)]
