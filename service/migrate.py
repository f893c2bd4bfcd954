"""The one way a database gets its tables: Alembic's migrations, under a lock, so that two processes may start at once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import create_engine, inspect, text
from sqlalchemy.engine import make_url

from service.locks import exclusive

if TYPE_CHECKING:  # Alembic is brought in by those who migrate: it would be an eighth of the API's start
    from alembic.config import Config

_MIGRATIONS = Path(__file__).parent.parent / "migrations"
_REVISION = re.compile(r"""^(revision|down_revision) = ['"](\w+)['"]""", re.MULTILINE)


def config(url: str) -> Config:
    from alembic.config import Config

    cfg = Config()
    cfg.set_main_option("script_location", str(_MIGRATIONS))
    cfg.set_main_option("sqlalchemy.url", url.replace("%", "%%"))
    return cfg


def upgrade(url: str, revision: str = "head") -> None:
    """Bring the database to `revision`; creates the SQLite file's folder. Safe to call from several processes."""
    from alembic import command

    with exclusive(url, "migrate"):
        command.upgrade(config(url), revision)


def downgrade(url: str, revision: str) -> None:
    from alembic import command

    with exclusive(url, "migrate"):
        command.downgrade(config(url), revision)


def is_current(url: str) -> bool:
    """Whether the database is at the newest revision."""
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite" and parsed.database and not Path(parsed.database).exists():
        return False  # connecting would make an empty file, or fail for want of its folder
    engine = create_engine(url)
    try:
        with engine.connect() as connection:
            if not inspect(connection).has_table("alembic_version"):
                return False
            return bool(connection.scalar(text("SELECT version_num FROM alembic_version")) == head())
    finally:
        engine.dispose()


def head() -> str:
    """The newest revision: the one that no other names as its predecessor."""
    named: dict[str, set[str]] = {"revision": set(), "down_revision": set()}
    for path in (_MIGRATIONS / "versions").glob("*.py"):
        for kind, revision in _REVISION.findall(path.read_text(encoding="utf-8")):
            named[kind].add(revision)
    (newest,) = named["revision"] - named["down_revision"]
    return newest
