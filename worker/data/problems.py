"""Malformed rows: all are counted, the first hundred kept with their number and reason."""

from __future__ import annotations

from service.errors import JobFailure

KEPT = 100


class RowError(ValueError):
    """What is wrong with one row."""


class Problems:
    """Collects malformed rows. Numbers are 1-based; docs/data.md says what is counted in each format."""

    def __init__(self) -> None:
        self.rows: list[dict[str, int | str]] = []
        self.count = 0

    def add(self, row: int, reason: str) -> None:
        self.count += 1
        if len(self.rows) < KEPT:
            self.rows.append({"row": row, "reason": reason})

    def check(self) -> None:
        """Raises JobFailure("invalid_data") if any row was malformed."""
        if not self.count:
            return
        first = self.rows[0]
        rest = "" if self.count <= KEPT else f"; the first {KEPT} are listed"
        many = "1 row is malformed" if self.count == 1 else f"{self.count} rows are malformed"
        raise JobFailure("invalid_data", f"{many}, first row {first['row']}: {first['reason']}{rest}", self.rows)


def missing_columns(missing: list[str], there: list[str]) -> JobFailure:
    """The failure of a template that names columns which no row has."""
    names = ", ".join(f"'{name}'" for name in missing)
    return JobFailure(
        "invalid_data",
        f"dataset.template names the column{'s' if len(missing) > 1 else ''} {names}, which the data do not have; "
        f"those there: {', '.join(sorted(there)) or 'none'}",
    )
