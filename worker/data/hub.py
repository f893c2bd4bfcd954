"""Hub sets and local folders through the datasets library."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from service.errors import JobFailure
from service.specs import DatasetSpec
from worker.data.problems import missing_columns
from worker.data.split import choose
from worker.data.uploads import Row, Source


def read_hub(spec: DatasetSpec, wanted: list[str], token: str | None) -> Source:
    """Open `spec.path` (a hub id, a folder of data files or a folder written by save_to_disk) and choose max_samples.

    Rows are numbered by their place in `spec.split`. A stream gives its first max_samples rows, in its own order.
    Raises JobFailure: dataset_not_found, hub_error (to be tried again) or invalid_data, here or while reading.
    """
    assert spec.path is not None
    path, local = _local(spec.path)
    data = _guard(spec, local, token, lambda: _open(spec, path, token))
    columns = list(data.column_names) if data.column_names else None
    used = [name for name in wanted if columns is not None and name in columns]
    if columns is not None and not used:
        raise missing_columns(wanted, columns)
    if used:
        data = data.select_columns(used)

    def pick() -> tuple[list[int] | None, Any]:
        chosen = choose(len(data), spec.max_samples, spec.seed)
        return chosen, data if chosen is None else data.select(chosen)

    def digest() -> str:
        """SHA-256 over the rows that are used, in Arrow's own form."""
        found = hashlib.sha256()
        for table in pick()[1].with_format("arrow").iter(batch_size=1000):
            found.update(table.schema.serialize())
            for batch in table.combine_chunks().to_batches():
                found.update(batch.serialize())
        return found.hexdigest()

    def rows() -> Iterator[Row]:
        if spec.streaming:
            assert spec.max_samples is not None
            yield from enumerate(data.take(spec.max_samples), 1)
            return
        chosen, picked = pick()
        numbers = iter(range(len(data)) if chosen is None else chosen)
        for batch in picked.iter(batch_size=1000):
            for values in zip(*batch.values(), strict=True):
                yield next(numbers) + 1, dict(zip(batch, values, strict=True))

    return Source(
        _guarded_rows(spec, local, token, rows()),
        columns,
        None if spec.streaming else lambda: _guard(spec, local, token, digest, reading=True),
    )


def _local(path: str) -> tuple[str, bool]:
    """The path as datasets takes it, and whether it is a folder. Raises JobFailure for a folder that is not there."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return str(folder.absolute()), True
    if path.startswith(("/", "./", "../", "~")):
        what = "is a file; upload it (POST /v1/files) and give file_id" if folder.is_file() else "is no folder"
        raise JobFailure("dataset_not_found", f"dataset.path: {path} {what}")
    return path, False


def _open(spec: DatasetSpec, path: str, token: str | None) -> Any:
    import datasets

    if (Path(path) / "dataset_info.json").is_file() or (Path(path) / "dataset_dict.json").is_file():
        return _from_disk(spec, path)
    return datasets.load_dataset(
        path, spec.name, revision=spec.revision, split=spec.split, streaming=spec.streaming, token=token
    )


def _from_disk(spec: DatasetSpec, path: str) -> Any:
    """A folder written by Dataset.save_to_disk or DatasetDict.save_to_disk."""
    import datasets

    data = datasets.load_from_disk(path)
    if isinstance(data, datasets.DatasetDict):
        if spec.split not in data:
            raise ValueError(f'Unknown split "{spec.split}". Should be one of {list(data)}')
        data = data[spec.split]
    elif spec.split != "train":
        raise ValueError(f'Unknown split "{spec.split}": the folder holds one set without splits, taken as "train"')
    return data.to_iterable_dataset() if spec.streaming else data


def _guarded_rows(spec: DatasetSpec, local: bool, token: str | None, rows: Iterator[Row]) -> Iterator[Row]:
    done = object()
    while (item := _guard(spec, local, token, lambda: next(rows, done), reading=True)) is not done:
        yield item


def _guard(spec: DatasetSpec, local: bool, token: str | None, call: Any, *, reading: bool = False) -> Any:
    """Run `call`; what datasets and the hub client raise becomes a JobFailure that says what to do."""
    import datasets.exceptions
    import httpx
    import huggingface_hub.errors as hub
    import pyarrow as pa

    def failure(code: str, error: BaseException, *, retry: bool = False) -> JobFailure:
        parts = [str(error)] + ([str(error.__cause__)] if error.__cause__ else [])
        message = " ".join(" ".join(part.split()) for part in parts)[:1000]
        message = message.replace(token, "***") if token else message
        return JobFailure(code, f"dataset {spec.path}: {message}", retry=retry)

    try:
        return call()
    except (datasets.exceptions.DatasetNotFoundError, hub.RepositoryNotFoundError, hub.RevisionNotFoundError) as e:
        hint = "" if token else " (a private or gated set needs a token: HF_TOKEN on the server, or X-HF-Token)"
        failed = failure("dataset_not_found", e)
        raise JobFailure(failed.code, failed.message + hint) from None
    except (FileNotFoundError, hub.HFValidationError) as e:
        # datasets says "not found" for a hub that does not answer, too, and names a folder of the server with it.
        if not local and "LocalEntryNotFoundError" in str(e):
            raise JobFailure("hub_error", f"dataset {spec.path}: the hub does not answer", retry=True) from None
        raise failure("dataset_not_found", e) from None
    except (datasets.exceptions.DatasetGenerationError, pa.ArrowException, UnicodeDecodeError) as e:
        network = isinstance(e.__cause__, (httpx.HTTPError, hub.HfHubHTTPError, ConnectionError))
        raise failure("hub_error" if network else "invalid_data", e, retry=network) from None
    except hub.HfHubHTTPError as e:
        denied = e.response is not None and e.response.status_code in (401, 403, 404)
        raise failure("dataset_not_found" if denied else "hub_error", e, retry=not denied) from None
    except (ConnectionError, TimeoutError, httpx.HTTPError, hub.OfflineModeIsEnabled) as e:
        raise failure("hub_error", e, retry=True) from None
    except ValueError as e:  # opening: an unknown configuration or split; it names those there are
        raise failure("invalid_data" if reading else "dataset_not_found", e) from None
