"""Identifiers: a prefix, then a time-ordered part, so that sorting by id is sorting by creation."""

from __future__ import annotations

import re
import secrets
import time


def new_id(prefix: str) -> str:
    """Return e.g. `job_0193a5c2f81b9d3e4f5a6b7c`: 48 bits of milliseconds, then 48 random bits, in hex.

    The same layout as UUIDv7 (RFC 9562) without its version bits.
    """
    return f"{prefix}_{time.time_ns() // 1_000_000:012x}{secrets.token_hex(6)}"


def is_id(text: str, prefix: str) -> bool:
    """Whether `text` has the form that new_id(prefix) gives; anything else need not be looked up."""
    return re.fullmatch(rf"{prefix}[_-][0-9a-f]{{24}}", text) is not None
