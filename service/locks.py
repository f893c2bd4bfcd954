"""A lock that all processes of one installation share, by name, held by at most one of them; it ends with its holder."""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url
from sqlalchemy.pool import NullPool

UP_LOCK = ".lorry-up.lock"  # in the data folder, held by the `lorry up` that runs there


@contextmanager
def exclusive(url: str, name: str, *, wait: bool = True) -> Iterator[bool]:
    """Hold the database's lock of this name; gives whether it is held, which is always so unless `wait` is off.

    An advisory lock of a Postgres session, or a lock on a file beside the SQLite file: no row that a dead process would
    leave behind. Creates the SQLite file's folder.
    """
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite":
        path = Path(parsed.database or "lorry.db")
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(f".{name}-lock"), "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True
        return
    engine = create_engine(url, poolclass=NullPool)
    key = {"key": int.from_bytes(hashlib.sha256(f"lorry {name}".encode()).digest()[:8], signed=True)}
    with engine.connect() as connection:
        if wait:
            connection.execute(text("SELECT pg_advisory_lock(:key)"), key)
            held = True
        else:
            held = bool(connection.scalar(text("SELECT pg_try_advisory_lock(:key)"), key))
        connection.commit()  # the lock belongs to the session and stays until that is closed
        yield held
