"""/v1/adapters: the registry."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated

from fastapi import APIRouter, Path
from starlette.concurrency import run_in_threadpool

from service.adapters import repository, schemas, service
from service.db import Database
from service.deps import DbDep, EngineDep, SettingsDep
from service.engines import Engines
from service.errors import LorryError
from service.json_body import Storable
from service.models import AdapterRow
from service.settings import Settings
from service.storage import open_storage
from service.wire import After, Deleted, Limit, Page

router = APIRouter(prefix="/v1/adapters", tags=["adapters"])
Name = Annotated[str, Path(description="Name of an adapter.")]
Ref = Annotated[str, Path(description="Name of an adapter, or name@step for a checkpoint.")]


@router.get("", response_model=Page[schemas.Adapter], summary="List adapters")
async def index(db: DbDep, engine: EngineDep, limit: Limit = 20, after: After = None) -> Page[schemas.Adapter]:
    """Finished ones, by name."""
    rows, more = await run_in_threadpool(_page, db, limit, after)
    loaded = await _loaded(engine)
    data = [schemas.adapter(r, None if loaded is None else r.name in loaded) for r in rows]
    return Page(data=data, has_more=more, next=rows[-1].name if more else None)


def _page(db: Database, limit: int, after: str | None) -> tuple[list[AdapterRow], bool]:
    with db.read() as session:
        rows, more = repository.list_page(session, limit=limit, after=after)
    return list(rows), more


@router.get("/{name}", response_model=schemas.Adapter, summary="One adapter")
async def show(name: Name, db: DbDep, engine: EngineDep) -> schemas.Adapter:
    return await _answer(await run_in_threadpool(_require, db, name), engine)


@router.patch("/{name}", response_model=schemas.Adapter, dependencies=[Storable], summary="Rename or pin an adapter")
async def change(
    name: Name, body: schemas.Change, db: DbDep, engine: EngineDep, settings: SettingsDep
) -> schemas.Adapter:
    """409 if the new name is taken, or while an unfinished job names the adapter. Engines that hold it keep a pinned one."""
    if body.name == settings.base_model:
        raise service.taken(body.name, "is the base model's name")
    row = await run_in_threadpool(service.change, db, name, new_name=body.name, pinned=body.pinned)
    if row.name != name:
        await engine.forget(name)
    elif body.pinned is not None:
        with suppress(LorryError):  # an engine that is away hears of it with the next request
            found = await run_in_threadpool(_resolve, db, settings, name)
            await engine.repin(found.target)
    return await _answer(row, engine)


@router.delete("/{name}", response_model=Deleted, summary="Delete an adapter")
async def delete(name: Name, db: DbDep, engine: EngineDep, settings: SettingsDep) -> Deleted:
    """Its files and its job's checkpoints go too. 409 while an unfinished job needs it."""
    await run_in_threadpool(service.delete, db, open_storage(settings), name)
    await engine.forget(name)
    return Deleted(id=name, object="adapter")


@router.post("/{name}/load", response_model=schemas.Loaded, summary="Load into an engine")
async def load(name: Ref, db: DbDep, engine: EngineDep, settings: SettingsDep) -> schemas.Loaded:
    """/generate does this by itself; here the first request need not wait for it. Of several engines, into one."""
    found = await run_in_threadpool(_resolve, db, settings, name)
    await engine.load(found.target)
    return schemas.Loaded(name=found.ref, loaded=True)


@router.post("/{name}/unload", response_model=schemas.Loaded, summary="Unload from every engine")
async def unload(name: Ref, db: DbDep, engine: EngineDep, settings: SettingsDep) -> schemas.Loaded:
    """Nothing happens if it is not loaded."""
    found = await run_in_threadpool(_resolve, db, settings, name)
    await engine.unload(found.ref)
    return schemas.Loaded(name=found.ref, loaded=False)


def _require(db: Database, name: str) -> AdapterRow:
    with db.read() as session:
        return service.require(session, name)


def _resolve(db: Database, settings: Settings, ref: str) -> service.Resolved:
    with db.read() as session:
        return service.resolve(session, open_storage(settings), ref)


async def _answer(row: AdapterRow, engine: Engines) -> schemas.Adapter:
    loaded = await _loaded(engine)
    return schemas.adapter(row, None if loaded is None else row.name in loaded)


async def _loaded(engine: Engines) -> set[str] | None:
    """Names that any engine holds; None if none answers."""
    try:
        return set(await engine.loaded())
    except LorryError:
        return None
