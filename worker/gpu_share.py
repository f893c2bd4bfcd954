"""One GPU for training and serving, by LORRY_GPU_POLICY. No torch here: the RQ parent loads this module.

shared: nothing is done; engine and job keep within their own memory. exclusive: before a job's child loads a model it takes a
lease on the memory of each engine on its GPU (POST /v1/sleep), renews it while it runs, and the worker ends it once the
child is dead and the GPU's memory free. A lease that nobody renews runs out. Whatever an engine does or does not answer, the
job goes on: training sees for itself how much memory there is.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import httpx

from service.engine_client import name_of
from service.settings import Settings

log = logging.getLogger("lorry.worker")
# The first phase of a job in which a model comes onto the GPU: trainings load one, exports ask one, or merge there.
GPU_PHASES = frozenset({"model", "loading", "merging"})
CONNECT_SECONDS = 2.0
OFFLOAD_SECONDS = 60.0  # beyond the grace period: what moving the weights may take
WAKE_SECONDS = 5.0
RENEWALS = 4  # in the time of a lease
UNABLE = "has no call to give its memory up (vLLM?)"


def owner_of_child() -> str:
    """Who holds a child's leases: its worker, which has one child at a time."""
    return os.environ.get("RQ_WORKER_ID", f"pid-{os.getpid()}")


class GpuShare:
    """A job's leases, in its child. A context manager; leaving it ends the renewals, not the leases: see `give_back`."""

    def __init__(self, settings: Settings, owner: str, eta: Callable[[], float | None] = lambda: None) -> None:
        """`eta` tells in how many seconds the job is expected to end; engines pass it on to those they turn away."""
        self._settings, self._owner, self._eta = settings, owner, eta
        self._urls = list(settings.gpu_engine_urls) if settings.gpu_policy == "exclusive" else []
        self._said: dict[str, str] = {}  # by URL, so that a renewal says nothing that was said
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join(CONNECT_SECONDS)

    def before(self, phase: str) -> None:
        """Take the leases, and wait for the memory, if this is the phase in which the job goes to the GPU."""
        if phase in GPU_PHASES and self._urls and self._thread is None:
            self._ask_all()
            self._thread = threading.Thread(target=self._renew, name="gpu-lease", daemon=True)
            self._thread.start()

    def _renew(self) -> None:
        while not self._end.wait(self._settings.gpu_lease_seconds / RENEWALS):
            self._ask_all()

    def _ask_all(self) -> None:
        """Ask every engine, anew each time: one may have been started meanwhile, or started again."""
        if urls := [url for url in self._urls if self._said.get(url) != UNABLE]:
            with ThreadPoolExecutor(len(urls)) as pool:
                list(pool.map(self._ask, urls))

    def _ask(self, url: str) -> None:
        """Raises nothing."""
        settings = self._settings
        body: dict[str, Any] = {
            "owner": self._owner,
            "lease_seconds": settings.gpu_lease_seconds,
            "grace_seconds": settings.gpu_grace_seconds,
            "expected_seconds": self._eta(),
        }
        timeout = httpx.Timeout(settings.gpu_grace_seconds + OFFLOAD_SECONDS, connect=CONNECT_SECONDS)
        try:
            answer = httpx.post(f"{url}/v1/sleep", json=body, timeout=timeout, trust_env=False)
            if answer.status_code in (404, 405):
                self._say(url, UNABLE)
            elif not answer.is_success:
                self._say(url, f"keeps its memory: status {answer.status_code} {answer.text[:300]}")
            elif not answer.json()["asleep"]:
                self._say(url, "did not give its memory up in time")
            else:
                self._say(url, "")
        except httpx.HTTPError as error:
            self._say(url, f"does not answer ({type(error).__name__})")
        except Exception as error:  # an answer from no engine at all, or a fault of ours: no reason to end a job
            self._say(url, f"answers what is not understood ({error!r})")

    def _say(self, url: str, trouble: str) -> None:
        if self._said.get(url) == trouble:
            return
        self._said[url] = trouble
        if trouble:
            log.warning("the engine at %s %s; the job goes on without its memory", name_of(url), trouble)
        else:
            log.info("the engine at %s has given its memory up", name_of(url))


def give_back(settings: Settings, owner: str) -> None:
    """End the owner's leases: its job's process is dead. Raises nothing; a lease that cannot be ended runs out."""
    if settings.gpu_policy != "exclusive":
        return
    for url in settings.gpu_engine_urls:
        try:
            httpx.post(
                f"{url}/v1/wake",
                json={"owner": owner},
                timeout=httpx.Timeout(WAKE_SECONDS, connect=CONNECT_SECONDS),
                trust_env=False,
            )
        except Exception as error:
            log.debug("the engine at %s was not told that its memory is free: %r", name_of(url), error)
