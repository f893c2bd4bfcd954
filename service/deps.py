"""What endpoints ask for by type: the parts that the lifespan put on app.state."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Protocol, cast

from fastapi import Depends, Request

from service.db import Database
from service.queue import JobQueue
from service.settings import Settings


class EngineClient(Protocol):
    """What the registry asks of the engine. Every call may raise LorryError, Unavailable if it does not answer."""

    async def loaded(self) -> Collection[str]: ...

    async def load(self, name: str, path: Path) -> None: ...

    async def unload(self, name: str) -> None: ...


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
