"""Sessions. `write()` takes SQLite's write lock at the start, so two writers queue instead of failing half-way."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.orm import Session, sessionmaker

_IDLE_SECONDS = 5.0  # a connection idle for longer is tested before it is used
_BUSY_SECONDS = 30  # how long a writer waits for SQLite's lock


class Database:
    """One engine for one process. Do not carry it across a fork: make a new one in the child."""

    def __init__(self, url: str, *, pool_size: int = 10) -> None:
        parsed = make_url(url)
        self.sqlite = parsed.get_backend_name() == "sqlite"
        if self.sqlite and parsed.database and parsed.database != ":memory:":
            Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
        kwargs: dict[str, Any] = {"pool_size": pool_size, "max_overflow": 20}
        if self.sqlite:
            kwargs["connect_args"] = {"timeout": _BUSY_SECONDS, "check_same_thread": False}
        self.engine = create_engine(url, **kwargs)
        if self.sqlite:
            _prepare_sqlite(self.engine)
        else:
            _ping_idle_connections(self.engine)
        # expire_on_commit off: rows are handed out after the commit and read without another query.
        self._read = sessionmaker(self.engine, expire_on_commit=False)
        self._write = sessionmaker(self.engine.execution_options(lorry_write=True), expire_on_commit=False)
        self._turn = threading.Lock()

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session for queries; nothing is committed."""
        with self._read() as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A session committed at the end of the block, rolled back on an exception. Keep slow work out of it."""
        with self._one_writer(), self._write.begin() as session:
            yield session

    @contextmanager
    def _one_writer(self) -> Iterator[None]:
        """On SQLite the writers of one process take turns here, not at the file's lock.

        There they would poll, ever more slowly, and under load some would wait for seconds. That lock still decides: for
        other processes, and for a writer that has waited long enough here.
        """
        held = self.sqlite and self._turn.acquire(timeout=_BUSY_SECONDS)
        try:
            yield
        finally:
            if held:
                self._turn.release()

    def dispose(self) -> None:
        self.engine.dispose()


def _ping_idle_connections(engine: Engine) -> None:
    """Test a pooled connection that has been idle for a while before it is used again.

    pool_pre_ping would test every one every time, a round trip more for each session.
    """

    @event.listens_for(engine, "checkin")
    def _checkin(connection: Any, record: Any) -> None:
        record.info["idle_since"] = time.monotonic()

    @event.listens_for(engine, "checkout")
    def _checkout(connection: Any, record: Any, proxy: Any) -> None:
        if time.monotonic() - record.info.get("idle_since", float("inf")) < _IDLE_SECONDS:
            return
        try:
            engine.dialect.do_ping(connection)
        except engine.dialect.loaded_dbapi.Error as error:
            raise DisconnectionError from error  # the pool throws it away and opens another


def _prepare_sqlite(engine: Any) -> None:
    @event.listens_for(engine, "connect")
    def _connect(dbapi_connection: Any, _: Any) -> None:
        # The driver's own transaction control begins too late (at the first write); ours begins in _begin.
        dbapi_connection.isolation_level = None
        cursor = dbapi_connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=FULL")  # a job answered with 202 survives a power cut
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        write = connection.get_execution_options().get("lorry_write")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
