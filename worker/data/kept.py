"""Tokenised data that jobs and dry runs leave for those that come after: a file each below LORRY_DATA_DIR/tokens.

A file is an Arrow stream (counts in its schema's metadata, training rows before evaluation rows), and behind it the SHA-256 of
all that. It is made once: who needs the same rows meanwhile waits and reads them. A file is read as a whole and not mapped:
on a file system that hosts share, one that another host removes would take the mapping, and the job, with it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.cache import Cache
from service.settings import Settings

log = logging.getLogger("lorry.data")
_META = b"lorry"
_DIGEST = 32  # bytes


@dataclass(frozen=True)
class Rows:
    """What a spec's data came to. `table`: input_ids and labels (lists of int32); without labels they are the ids."""

    table: Any  # pyarrow.Table, the training rows first
    train_rows: int
    fingerprint: str
    report: dict[str, Any]

    def train(self) -> Any:
        """datasets.Dataset of the training rows."""
        return self._side("train", 0, self.train_rows)

    def eval(self) -> Any | None:
        """datasets.Dataset of the evaluation rows, if there are any."""
        count = self.table.num_rows - self.train_rows
        return self._side("eval", self.train_rows, count) if count else None

    def _side(self, name: str, start: int, count: int) -> Any:
        import datasets

        table = self.table.slice(start, count)
        if "labels" not in table.column_names:
            # The same buffers twice: labels that are the ids take no memory of their own.
            table = table.append_column("labels", table["input_ids"])
        return datasets.Dataset(table, fingerprint=f"{self.fingerprint[:48]}-{name}")  # else it would hash all rows


class TokenCache:
    """The kept data of one data folder, up to a limit, those that were used last."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.limit = limit
        self.cache = Cache(folder, limit, grace=0)  # who reads a file has it locked

    @classmethod
    def of(cls, settings: Settings) -> TokenCache:
        return cls(settings.tokens_dir, settings.token_cache_bytes)

    def get(self, key: str, make: Callable[[], Rows]) -> tuple[Rows, bool]:
        """The rows under a key, and whether they were there. Else they are made, and kept if the disk allows it.

        Raises what `make` raises.
        """
        name = f"{key}.arrow"
        with ExitStack() as held:
            try:
                if (self.cache.root / name).exists():  # several may read at once
                    with self.cache.reading(name) as place:
                        found = _read(place)
                    if found is not None:
                        return found, True
                place, staging = held.enter_context(self.cache.making(name))
            except OSError as error:  # a full or read-only disk must not cost a job
                log.warning("tokenised data cannot be kept: %s", error)
                return make(), False
            found = _read(place)  # another may have made it while this one waited
            if found is not None:
                return found, True
            rows = make()
            try:
                self._write(rows, staging)
            except OSError as error:
                log.warning("tokenised data cannot be kept: %s", error)
                staging.unlink(missing_ok=True)
            return rows, False

    def _write(self, rows: Rows, path: Path) -> None:
        """Write and sync the file. Leaves none if it would not fit the limit by itself. Raises OSError."""
        import pyarrow as pa

        if rows.table.nbytes > self.limit:
            log.warning("tokenised data are not kept: %d bytes are beyond the limit", rows.table.nbytes)
            return
        meta = {"train_rows": rows.train_rows, "fingerprint": rows.fingerprint, "report": rows.report}
        table = rows.table.replace_schema_metadata({_META: json.dumps(meta).encode()})
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        with open(path, "r+b") as file:
            digest = hashlib.file_digest(file, "sha256").digest()
            file.seek(0, os.SEEK_END)
            file.write(digest)
            file.flush()
            os.fsync(file.fileno())


def _read(path: Path) -> Rows | None:
    """The rows of a file; None if it is not there or not as it was written."""
    import pyarrow as pa

    try:
        with pa.OSFile(str(path)) as file:
            buffer = file.read_buffer()
        size = buffer.size - _DIGEST
        if size <= 0 or hashlib.sha256(memoryview(buffer)[:size]).digest() != buffer.slice(size).to_pybytes():
            log.warning("%s is damaged; the data are tokenised again", path)
            return None
        table = pa.ipc.open_stream(buffer.slice(0, size)).read_all()
        meta = json.loads(table.schema.metadata[_META])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        log.warning("%s cannot be read (%s); the data are tokenised again", path, error)
        return None
    return Rows(table.replace_schema_metadata(), meta["train_rows"], meta["fingerprint"], meta["report"])
