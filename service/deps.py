"""What endpoints ask for by type: the parts that the lifespan put on app.state."""

from __future__ import annotations

from typing import Annotated, cast

from fastapi import Depends, Request

from service.db import Database
from service.engine_client import EngineClient
from service.queue import JobQueue
from service.settings import Settings


def _settings(request: Request) -> Settings:
    return cast(Settings, request.app.state.settings)


def _db(request: Request) -> Database:
    return cast(Database, request.app.state.db)


def _queue(request: Request) -> JobQueue:
    return cast(JobQueue, request.app.state.queue)


def _engine(request: Request) -> EngineClient:
    return cast(EngineClient, request.app.state.engine)


SettingsDep = Annotated[Settings, Depends(_settings)]
DbDep = Annotated[Database, Depends(_db)]
EngineDep = Annotated[EngineClient, Depends(_engine)]
QueueDep = Annotated[JobQueue, Depends(_queue)]
