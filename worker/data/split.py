"""Which rows, and on which side: datasets' own shuffle and train_test_split, applied to row numbers."""

from __future__ import annotations

from typing import Any

from service.errors import JobFailure
from service.specs import DatasetSpec


def choose(rows: int, max_samples: int | None, seed: int) -> list[int] | None:
    """The rows that `Dataset.shuffle(seed=seed).select(range(max_samples))` keeps, or None for all in their order."""
    if max_samples is None or max_samples >= rows:
        return None
    chosen: list[int] = _indices(rows).shuffle(seed=seed)[:max_samples]["row"]
    return chosen


def split(rows: int, spec: DatasetSpec) -> tuple[list[int], list[int]]:
    """Train and evaluation rows, as `Dataset.train_test_split(test_size, seed)` divides them.

    Raises JobFailure("invalid_data") if a side would be empty.
    """
    if spec.test_size == 0:
        return list(range(rows)), []
    size: Any = spec.test_size if spec.test_size < 1 else int(spec.test_size)
    if rows < 2 or (size >= 1 and size >= rows):
        raise JobFailure(
            "invalid_data",
            f"{rows} {'row is' if rows == 1 else 'rows are'} too few for dataset.test_size {size:g}: "
            "training needs at least one row and evaluation too; give more rows, or test_size 0 for no evaluation",
        )
    if size < 1 and rows - _ceil(size * rows) < 1:
        size = rows - 1  # a fraction close to 1 of few rows: one row is left for training
    parts = _indices(rows).train_test_split(test_size=size, seed=spec.seed)
    return parts["train"]["row"][:], parts["test"]["row"][:]


def _ceil(number: float) -> int:
    return -int(-number // 1)


def _indices(rows: int) -> Any:
    import datasets

    return datasets.Dataset.from_dict({"row": list(range(rows))})
