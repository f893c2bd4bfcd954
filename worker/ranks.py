"""The processes that train one model together, each on a device of its own: what a recipe sees of them. No torch here.

Every rank is handed the same rows in the same order and computes the part of a step that share() gives it; what is
learnt follows from the sums over all ranks. So a rank's trainer is that of one process, and a step is the same whatever
their number. This class is a process alone; worker/distributed.py has the one of several.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any


class Ranks:
    """This process, `rank` of `size`. The calls below are made by all ranks in the same order, or by none."""

    rank, size = 0, 1

    @property
    def first(self) -> bool:
        """Whether this is the one that reports, saves and answers."""
        return self.rank == 0

    def share(self, lengths: Sequence[int]) -> list[int]:
        """Which rows of a step are this rank's, in order: even in tokens, and every row somebody's."""
        return shares(lengths, self.size)[self.rank]

    def join(self, weights: Iterable[Any], same: str) -> None:
        """Meet the others; all go on with rank 0's `weights` (tensors, in place). Raises JobFailure if `same` differs."""

    def leave(self) -> None:
        """The last of these calls: from here on each goes its own way."""

    def wait(self) -> None:
        """Until all are here."""

    def of_first(self, value: int) -> int:
        """Rank 0's value."""
        return value

    def gather(self, value: Any) -> list[Any]:
        """Everyone's value, by rank."""
        return [value]

    def anyone(self, flag: bool) -> bool:
        return flag

    def least(self, values: list[int]) -> list[int]:
        """The smallest at each place."""
        return values

    def total(self, value: float) -> float:
        return value

    def add_up(self, tensors: list[Any]) -> None:
        """Make each tensor, in place, the sum over all ranks."""

    def own_randomness(self, seed: int) -> AbstractContextManager[Any]:
        """Within: random numbers of this rank's own (dropout). Outside them all ranks draw the same."""
        return nullcontext()


ALONE = Ranks()


def shares(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Deal rows out, the longest first, each to the part with the fewest tokens so far (Graham, LPT)."""
    held = [(0, 0, part) for part in range(parts)]
    out: list[list[int]] = [[] for _ in range(parts)]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        tokens, rows, part = heapq.heappop(held)
        out[part].append(i)
        heapq.heappush(held, (tokens + lengths[i], rows + 1, part))
    return [sorted(rows) for rows in out]
