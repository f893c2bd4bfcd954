"""A check on JSON bodies as parsed: JSON's escapes and Python's reader let values through that nothing behind them can
write again: half a surrogate pair, NaN and the infinities, nesting without end."""

from __future__ import annotations

import math
from typing import Any

from fastapi import Depends, Request

from service.errors import Invalid

MAX_DEPTH = 100


async def _writable(request: Request) -> None:
    _check(await _parsed(request), nul=True)


async def _storable(request: Request) -> None:
    _check(await _parsed(request), nul=False)


# For a route's `dependencies`. They are solved after FastAPI has read the body and before its model is checked.
Writable = Depends(_writable)
Storable = Depends(_storable)  # also without U+0000, which Postgres refuses in JSON


async def _parsed(request: Request) -> Any:
    if "json" not in request.headers.get("content-type", "").lower():
        return None
    try:
        return await request.json()  # parsed once: the request keeps it
    except (ValueError, RecursionError):
        return None  # told apart and answered with the body's own check


def _check(body: Any, *, nul: bool) -> None:
    """Raises Invalid, with the path of the field as param."""
    stack: list[tuple[Any, tuple[str, ...]]] = [(body, ())]
    while stack:
        value, path = stack.pop()
        if isinstance(value, str):
            fault = _fault(value, nul)
            if fault:
                raise _invalid(path, fault)
        elif isinstance(value, float):
            if not math.isfinite(value):
                raise _invalid(path, f"must be a finite number, not {value}")
        elif isinstance(value, dict | list):
            if len(path) >= MAX_DEPTH:
                raise _invalid(path[:3], f"is nested more than {MAX_DEPTH} deep")
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, item in items:
                if isinstance(key, str) and (fault := _fault(key, nul)):
                    raise _invalid((*path, key), f"a field's name {fault}")
                if isinstance(item, str | float | dict | list):
                    stack.append((item, (*path, str(key))))


def _fault(text: str, nul: bool) -> str | None:
    if not nul and "\0" in text:
        return "holds the character U+0000, which cannot be stored"
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return f"holds U+{ord(text[error.start]):04X} at character {error.start}, half of a surrogate pair"
    return None


def _invalid(path: tuple[str, ...], fault: str) -> Invalid:
    param = ".".join(path).encode(errors="backslashreplace").decode() or None
    return Invalid(f"{param}: {fault}" if param else fault, param=param)
