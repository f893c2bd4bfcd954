"""The threads of the tokenizers library: on where many texts are tokenised, off everywhere else."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

NAME = "TOKENIZERS_PARALLELISM"


@contextmanager
def all_cores() -> Iterator[None]:
    """Within: a batch of texts is tokenised by as many threads as the process may use cores (RAYON_NUM_THREADS says fewer).

    Only then: a process that is forked while they are allowed gets a warning about each. What the environment says goes
    before; empty, which the library takes for off, counts as nothing said (worker/tasks.py sets it so).
    """
    before = os.environ.get(NAME)
    if before:
        yield
        return
    os.environ[NAME] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ[NAME]
        else:
            os.environ[NAME] = before
