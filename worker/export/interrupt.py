"""Cancel within a second also where a library works for minutes: loading a model, a forward pass on a CPU."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from worker.outcome import Interrupted, Progress, check

POLL_SECONDS = 0.25


class Guard:
    """Reports progress from within an interruptible block; the exception waits until the report is stored."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.why: BaseException | None = None
        self.held = self.over = False

    def __call__(self, done: int, total: int) -> None:
        self.held = True
        try:
            self.progress.steps({"step": done, "total_steps": total})
        finally:
            self.held = False
        self.stop()

    def stop(self, *_: object) -> None:
        """Raise why the block must end, if it must; the handler of the signal."""
        if self.why is not None and not self.held and not self.over:
            raise self.why


@contextmanager
def interruptible(progress: Progress) -> Iterator[Guard]:
    """Raise Interrupted (or Fenced) in the main thread, wherever it is, once the run is asked to end.

    A thread asks; the exception comes through a signal, so that it reaches code that never asks. Only for blocks whose
    half-done work is thrown away. Outside the main thread, where there are no signals, it asks at the end only.
    """
    guard = Guard(progress)
    if threading.current_thread() is not threading.main_thread():
        yield guard
        check(progress)
        return
    main, end = threading.get_ident(), threading.Event()

    def watch() -> None:
        while not end.wait(POLL_SECONDS):
            try:
                ask = progress.asked()
            except BaseException as error:  # Fenced, or a database that stayed away: the run's end as well
                guard.why = error
            else:
                if not ask:
                    continue
                guard.why = Interrupted(ask)
            signal.pthread_kill(main, signal.SIGUSR2)
            return

    previous = signal.signal(signal.SIGUSR2, guard.stop)
    watcher = threading.Thread(target=watch, name="asked", daemon=True)
    watcher.start()
    try:
        yield guard
    finally:
        guard.over = True
        end.set()
        watcher.join()
        signal.signal(signal.SIGUSR2, previous)
    check(progress)
