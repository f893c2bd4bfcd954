"""The one way a database gets its tables: Alembic's migrations, under a lock, so that two processes may start at once."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url

_ADVISORY_LOCK = 0x6C6F727279  # "lorry"


def config(url: str) -> Config:
    cfg = Config()
    cfg.set_main_option("script_location", str(Path(__file__).parent.parent / "migrations"))
    cfg.set_main_option("sqlalchemy.url", url.replace("%", "%%"))
    return cfg


def upgrade(url: str, revision: str = "head") -> None:
    """Bring the database to `revision`; creates the SQLite file's folder. Safe to call from several processes."""
    with _lock(url):
        command.upgrade(config(url), revision)


def downgrade(url: str, revision: str) -> None:
    with _lock(url):
        command.downgrade(config(url), revision)


def is_current(url: str) -> bool:
    """Whether the database is at the newest revision."""
    head = ScriptDirectory.from_config(config(url)).get_current_head()
    engine = create_engine(url)
    try:
        with engine.connect() as connection:
            return MigrationContext.configure(connection).get_current_revision() == head
    finally:
        engine.dispose()


@contextmanager
def _lock(url: str) -> Iterator[None]:
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite":
        path = Path(parsed.database or "lorry.db")
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".migrate-lock"), "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
        return
    engine = create_engine(url)
    try:
        with engine.connect() as connection:
            connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": _ADVISORY_LOCK})
            connection.commit()  # the lock belongs to the session and stays
            yield
            connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": _ADVISORY_LOCK})
    finally:
        engine.dispose()
