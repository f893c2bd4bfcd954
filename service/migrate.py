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
    """Bring the database up to `revision`; creates the SQLite file's folder. Safe to call from several processes.

    Raises alembic.util.CommandError for a database at a revision that this lorry does not know.
    """
    from alembic import command

    with exclusive(url, "migrate"):
        _check_known(url)
        command.upgrade(config(url), revision)


def downgrade(url: str, revision: str) -> None:
    """Bring the database down to `revision`; what newer revisions added is lost. Raises as upgrade does."""
    from alembic import command

    with exclusive(url, "migrate"):
        _check_known(url)
        command.downgrade(config(url), revision)


def move(url: str, revision: str) -> None:
    """Up or down, whichever it takes."""
    present = revision_of(url)
    older = present in known() and revision != "head" and revision in _ancestors(present)
    (downgrade if older else upgrade)(url, revision)


def _check_known(url: str) -> None:
    from alembic.util import CommandError

    present = revision_of(url)
    if present is not None and present not in known():
        raise CommandError(
            f"the database is at revision {present}, which this lorry does not know: a newer one migrated it. Use that, "
            "or let it go back with `lorry migrate --to` first"
        )


def is_current(url: str) -> bool:
    """Whether the database is at the newest revision."""
    return revision_of(url) == head()


def revision_of(url: str) -> str | None:
    """The revision the database is at; None if it has none of our tables, or is not there."""
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite" and parsed.database and not Path(parsed.database).exists():
        return None  # connecting would make an empty file, or fail for want of its folder
    engine = create_engine(url)
    try:
        with engine.connect() as connection:
            if not inspect(connection).has_table("alembic_version"):
                return None
            revision: str | None = connection.scalar(text("SELECT version_num FROM alembic_version"))
            return revision
    finally:
        engine.dispose()


def head() -> str:
    """The newest revision: the one that no other names as its predecessor."""
    pairs = _pairs()
    (newest,) = {revision for revision, _ in pairs} - {below for _, below in pairs}
    return newest


def known() -> frozenset[str]:
    """Every revision this lorry has a migration for."""
    return frozenset(revision for revision, _ in _pairs())


def _ancestors(revision: str | None) -> set[str]:
    """The revisions below one."""
    parents = dict(_pairs())
    found: set[str] = set()
    while (revision := parents.get(revision or "")) is not None:
        found.add(revision)
    return found


def _pairs() -> list[tuple[str, str | None]]:
    """(revision, the one below it), read without importing Alembic or the migrations."""
    out: list[tuple[str, str | None]] = []
    for path in (_MIGRATIONS / "versions").glob("*.py"):
        names = dict(_REVISION.findall(path.read_text(encoding="utf-8")))
        out.append((names["revision"], names.get("down_revision")))
    return out
