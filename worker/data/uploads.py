"""Uploads as (row number, row) pairs, read one after the other; what is malformed is reported and left out."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.errors import JobFailure
from service.templates import kind_of
from worker.data.problems import Problems

Row = tuple[int, dict[str, Any]]
FORMATS = (".jsonl", ".json", ".csv", ".parquet", ".txt")


@dataclass
class Source:
    """Rows to come. `columns` is None where only the rows themselves tell them.

    `digest` gives the SHA-256 of all that the rows hold, without using them up; uploads are known by their files' instead,
    and a stream has none.
    """

    rows: Iterator[Row]
    columns: list[str] | None = None
    digest: Callable[[], str] | None = None


def read_upload(file: Path, problems: Problems, wanted: list[str]) -> Source:
    """Open an upload by its suffix. `wanted`: the columns to read of a parquet file; the other formats give all.

    Malformed rows go to `problems` while reading. Raises JobFailure("invalid_data"), here or while reading, for a file
    that cannot be read at all.
    """
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".txt": _txt}
    suffix = file.suffix.lower()
    if not file.is_file():
        raise JobFailure("invalid_data", "the uploaded file is no longer there")
    if suffix == ".parquet":
        return _parquet(file, problems, wanted)
    if suffix not in readers:
        raise JobFailure(
            "invalid_data", f"an upload's name ends in one of {', '.join(FORMATS)}; this one in '{suffix}'"
        )
    return Source(readers[suffix](file, problems))


def _lines(file: Path, problems: Problems) -> Iterator[tuple[int, str | None]]:
    """Physical lines with their ending; None for one that is not UTF-8."""
    with open(file, "rb") as stream:
        for number, raw in enumerate(stream, 1):
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as e:
                problems.add(number, f"not UTF-8: byte 0x{raw[e.start]:02x} at byte {e.start + 1} of the line")
                yield number, None


def _jsonl(file: Path, problems: Problems) -> Iterator[Row]:
    for number, line in _lines(file, problems):
        if line is None or not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as e:
            problems.add(number, f"malformed JSON: {e.msg} at character {e.pos + 1}")
        except (ValueError, RecursionError) as e:  # a number of thousands of digits; lists in lists in lists
            problems.add(number, f"malformed JSON: {e}")
        else:
            yield from _object(number, row, problems)


def _object(number: int, row: Any, problems: Problems) -> Iterator[Row]:
    if isinstance(row, dict):
        yield number, row
    else:
        problems.add(number, f"{kind_of(row)}, expected an object")


def _json(file: Path, problems: Problems) -> Iterator[Row]:
    """A list of objects or {"data": [...]}. JSON Lines under this name are read as such."""
    raw = file.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        column = e.start - raw.rfind(b"\n", 0, e.start)
        problems.add(
            raw.count(b"\n", 0, e.start) + 1, f"not UTF-8: byte 0x{raw[e.start]:02x} at byte {column} of the line"
        )
        return
    if not text.strip():
        return
    try:
        data = json.loads(text)
    except json.JSONDecodeError as e:
        if _is_object(text.lstrip().split("\n", 1)[0]):
            yield from _jsonl(file, problems)
        else:
            _report_json(text, e, problems)
        return
    except (ValueError, RecursionError) as e:
        raise JobFailure("invalid_data", f"malformed JSON: {e}") from None
    if isinstance(data, dict) and isinstance(data.get("data"), list):
        data = data["data"]
    if isinstance(data, dict):
        data = [data]  # one JSON line
    if not isinstance(data, list):
        raise JobFailure(
            "invalid_data", f'the file holds {kind_of(data)}, expected a list of objects or {{"data": [...]}}'
        )
    for number, row in enumerate(data, 1):
        yield from _object(number, row, problems)


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _report_json(text: str, error: json.JSONDecodeError, problems: Problems) -> None:
    """Name the list's element that does not parse; for another shape, the line."""
    reason = f"malformed JSON: {error.msg} (line {error.lineno}, column {error.colno})"
    decoder, space = json.JSONDecoder(), re.compile(r"\s*")

    def skip(at: int) -> int:
        found = space.match(text, at)
        return found.end() if found else at

    at, number = skip(0), error.lineno
    if text.startswith("[", at):
        number = 0
        while at < len(text) and text[at] in "[,":
            number += 1
            try:
                _, at = decoder.raw_decode(text, skip(at + 1))
            except json.JSONDecodeError:
                break
            at = skip(at)
    problems.add(number, reason)


def _csv(file: Path, problems: Problems) -> Iterator[Row]:
    """Rows are numbered by the line they begin on; the header is line 1."""
    csv.field_size_limit(sys.maxsize)
    # A line that is not UTF-8 is reported already; an empty one in its place keeps the line numbers right.
    reader = csv.reader(("\n" if line is None else line for _, line in _lines(file, problems)), strict=True)
    try:
        header = next(reader, None)
    except csv.Error as e:
        raise JobFailure("invalid_data", f"the header is not CSV: {e}") from None
    if not header or not any(name.strip() for name in header):
        return
    if len(set(header)) != len(header):
        twice = sorted({name for name in header if header.count(name) > 1})
        raise JobFailure("invalid_data", f"the header names a column twice: {', '.join(twice)}")
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as e:
            problems.add(number, f"malformed CSV: {e}")
            continue
        if cells is None:
            return
        if cells and len(cells) != len(header):
            problems.add(number, f"{len(cells)} {'cell' if len(cells) == 1 else 'cells'}, the header has {len(header)}")
        elif cells:
            yield number, dict(zip(header, cells, strict=True))


def _txt(file: Path, problems: Problems) -> Iterator[Row]:
    """The whole file as one row, {"text": ...}."""
    lines = [line for _, line in _lines(file, problems) if line is not None]
    text = "".join(lines)
    if text.strip():
        yield 1, {"text": text}


def _parquet(file: Path, problems: Problems, wanted: list[str]) -> Source:
    import pyarrow as pa
    import pyarrow.parquet as pq

    unreadable = (pa.ArrowException, OSError)  # pyarrow's own errors, and Thrift's, which come as OSError
    try:
        parquet = pq.ParquetFile(file)
    except unreadable as e:
        raise JobFailure("invalid_data", f"not a readable parquet file: {e}") from None
    there = list(parquet.schema_arrow.names)

    def rows() -> Iterator[Row]:
        number = 0
        try:
            for batch in parquet.iter_batches(batch_size=1000, columns=[name for name in there if name in wanted]):
                for at in range(batch.num_rows):
                    number += 1
                    try:
                        yield number, batch.slice(at, 1).to_pylist()[0]
                    except UnicodeDecodeError as e:
                        problems.add(number, f"not UTF-8: {e.reason}")
        except unreadable as e:
            raise JobFailure("invalid_data", f"parquet file, after row {number}: {e}") from None

    return Source(rows(), there)
