"""Run once by docker compose, before all else: every secret as a file in one volume.

A file in deploy/secrets is taken as it is. What is not given there is kept from before, or made up. The files are
readable by every user of the containers that mount the volume, and on the host by root alone.
"""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path
from urllib.parse import quote

MADE_UP = ("postgres_password", "redis_password", "lorry_api_key", "grafana_password")


def make(given: Path, out: Path) -> None:
    """Fill `out`. Raises OSError."""
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(given.iterdir()) if given.is_dir() else []:
        if path.is_file() and not path.name.startswith(".") and path.suffix != ".md":
            write(out / path.name, path.read_text("utf-8").strip())
    for name in MADE_UP:
        if not (out / name).exists():
            write(out / name, secrets.token_urlsafe(32))
    values = {name: (out / name).read_text("utf-8") for name in MADE_UP}
    postgres, redis = quote(values["postgres_password"], safe=""), quote(values["redis_password"], safe="")
    derived = {
        "lorry_database_url": f"postgresql+psycopg://lorry:{postgres}@postgres:5432/lorry",
        "lorry_redis_url": f"redis://:{redis}@redis:6379/0",
        "redis.conf": f'requirepass "{values["redis_password"]}"\n',
    }
    for name, text in derived.items():
        if not (given / name).exists():
            write(out / name, text)


def write(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.new")
    with open(beside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.chmod(0o444)
    beside.replace(path)


if __name__ == "__main__":
    make(Path(sys.argv[1]), Path(sys.argv[2]))
