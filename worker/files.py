"""Files that are whole or not there: write beside, fsync, rename."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"  # of an export; written last: a folder without one is no export


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Give a folder beside `target` to write into; on success it is synced and takes `target`'s place, else it is removed."""
    staging = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        replace_folder(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def replace_folder(staging: Path, target: Path) -> None:
    """Sync every file of `staging` and rename it to `target`, which is removed first if it is there."""
    for path in staging.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    if target.exists():
        old = target.with_name(f".{target.name}.{os.getpid()}.old")
        os.replace(target, old)
        os.replace(staging, target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(staging, target)
    _sync_dir(target.parent)


def write_json(path: Path, data: Any) -> None:
    """Write JSON whole: beside, synced, renamed."""
    staging = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(staging, "w", encoding="utf-8") as file:
        json.dump(data, file, indent=2, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(staging, path)


def folder_bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def list_files(folder: Path) -> list[dict[str, Any]]:
    """Every file below `folder` as {path (relative, posix), bytes, sha256}, sorted by path."""
    return [list_file(path, folder) for path in sorted(p for p in folder.rglob("*") if p.is_file())]


def list_file(path: Path, folder: Path) -> dict[str, Any]:
    """One file of `folder` as {path (relative, posix), bytes, sha256}."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"path": path.relative_to(folder).as_posix(), "bytes": path.stat().st_size, "sha256": digest}


def _sync_dir(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
