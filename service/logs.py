"""Logging of a process: one format, one level, to stderr."""

from __future__ import annotations

import logging

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def configure(level: str) -> None:
    """Set up the root logger. Raises SystemExit for a level that is none."""
    try:
        logging.basicConfig(level=level.upper(), format=FORMAT, force=True)
    except ValueError as error:
        raise SystemExit(f"LORRY_LOG_LEVEL: {error}") from error
    logging.getLogger("httpx").setLevel("WARNING")  # a line per call to the engine
    logging.getLogger("alembic").setLevel("WARNING")
