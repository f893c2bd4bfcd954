"""Giving the engine's memory up while a job trains on the same GPU, and taking it back.

A worker asks for it with a lease, which it renews; the engine sleeps while any lease is open, and a lease ends by itself.
From the first lease on no request is taken. Those under way may end within a grace period; what is left then goes back to
the waiting ones with its tokens kept, as when the cache is full, and goes on after waking. Then the keys and values are
dropped and the weights, the adapters' too, go to the host's memory. vLLM's sleep mode (level 1) does the same with the
memory, knows no leases, and aborts what runs.
"""

from __future__ import annotations

import asyncio
import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from service.errors import Unavailable
from worker.devices import free_host_memory
from worker.engine.lora import AdapterWeights

log = logging.getLogger("lorry.engine")
SHORTEST, LONGEST = 5, 3600  # seconds that Retry-After says
RETRY = 2.0  # seconds between two tries to take the memory back
_POLL = 0.02


@dataclass(frozen=True, slots=True)
class Lease:
    """Until when the engine is to sleep, and when that is expected to be over, on time.monotonic's clock."""

    until: float
    expected: float | None


class Sleep:
    """Whether the engine is to sleep, and whether it does.

    `ask`, `wake`, `check` and `wakes_in` may be called from any thread, under `lock`, which is notified of changes; `turn`
    by the engine's thread alone. `lay_down` pauses what runs and gives the memory up, `get_up` takes it back; both may
    raise RuntimeError (torch's out of memory is one) or MemoryError, and be called again.
    """

    def __init__(self, lock: threading.Condition, lay_down: Callable[[], None], get_up: Callable[[], None]) -> None:
        self.asleep = False  # no step may be taken
        self.free = False  # the memory has been given up
        self.failure: str | None = None  # why the memory could not be given up; until the leases have ended
        self._lock = lock
        self._lay_down, self._get_up = lay_down, get_up
        self._leases: dict[str, Lease] = {}
        self._grace_ends = 0.0
        self._retry_at = 0.0

    # Anybody's

    async def ask(self, owner: str, seconds: float, *, grace: float, expected: float | None = None) -> bool:
        """Open or renew `owner`'s lease and wait until the memory has been given up, or the lease has ended (False).

        Times in seconds; `expected`: from now until the memory is not needed any more. Raises Unavailable
        (engine_cannot_sleep).
        """
        with self._lock:
            now = time.monotonic()
            if not self._wanted():
                self._grace_ends = now + grace
            self._leases[owner] = Lease(now + seconds, None if expected is None else now + expected)
            self._lock.notify()
        while not self.free:
            if self.failure is not None:
                raise Unavailable(f"the engine keeps its memory: {self.failure}", code="engine_cannot_sleep")
            with self._lock:
                self._drop_ended()
                if owner not in self._leases:
                    return False
            await asyncio.sleep(_POLL)
        return True

    def wake(self, owner: str) -> None:
        """End a lease; nothing happens if there is none."""
        with self._lock:
            self._leases.pop(owner, None)
            self._lock.notify()

    def check(self) -> None:
        """Raises Unavailable (engine_asleep) while no request is taken."""
        if (seconds := self.wakes_in()) is not None:
            raise Unavailable(
                "the engine is asleep: a job has the memory of its GPU", retry_after=seconds, code="engine_asleep"
            )

    def wakes_in(self) -> int | None:
        """Seconds after which to try again, as far as the leases tell; None while requests are taken."""
        with self._lock:
            if not self._wanted() and not self.asleep:
                return None
            now = time.monotonic()
            ends = [lease.until if lease.expected is None else lease.expected for lease in self._leases.values()]
            return min(LONGEST, max(SHORTEST, math.ceil(max(ends, default=now) - now)))

    # The engine's thread's

    def due(self, work: bool) -> bool:
        """Under the lock: whether `turn` would do something. `work`: requests are under way."""
        now = time.monotonic()
        if self._wanted():
            return not self.free and (self.asleep or not work or now >= self._grace_ends)
        return self.asleep and now >= self._retry_at

    def seconds(self) -> float | None:
        """Under the lock: how long at most to wait before looking again; None for ever."""
        now = time.monotonic()
        ends = [lease.until for lease in self._leases.values()]
        ends += [at for at in (self._grace_ends, self._retry_at) if at > now]
        return max(0.0, min(ends) - now) if ends else None

    def turn(self, work: bool) -> bool:
        """Lie down or get up if it is time to. Returns whether the engine may take a step."""
        with self._lock:
            due, wanted = self.due(work), self._wanted()
        if due and wanted:
            self._try_to_lie_down()
        elif due:
            self._try_to_get_up()
        return not self.asleep

    def _try_to_lie_down(self) -> None:
        began = time.monotonic()
        self.asleep = True  # before: what fails half-way has to be got back
        try:
            self._lay_down()
        except (RuntimeError, MemoryError) as error:
            log.error("the engine cannot give its memory up: %s", error)
            self.failure = str(error) or type(error).__name__
            self._try_to_get_up()
        else:
            self.free, self._retry_at = True, 0.0
            log.info("asleep: the memory was given up in %.1f s", time.monotonic() - began)

    def _try_to_get_up(self) -> None:
        began = time.monotonic()
        self.free = False
        try:
            self._get_up()
        except (RuntimeError, MemoryError) as error:  # who had the memory has not quite let it go
            if not self._retry_at:
                log.warning("the engine cannot have its memory back yet: %s", error)
            self._retry_at = time.monotonic() + RETRY
        else:
            self.asleep, self._retry_at = False, 0.0
            log.info("awake: the memory was taken back in %.1f s", time.monotonic() - began)

    def _wanted(self) -> bool:
        self._drop_ended()
        return bool(self._leases) and self.failure is None

    def _drop_ended(self) -> None:
        now = time.monotonic()
        for owner in [owner for owner, lease in self._leases.items() if lease.until <= now]:
            log.warning("the lease of %s ran out", owner)
            del self._leases[owner]
        if not self._leases:
            self.failure = None


# The memory

STEP_BYTES = 1 << 30  # left for what a step computes, where the memory is limited


def limit_memory(fraction: float) -> None:
    """Keep this process within a fraction of its GPU's memory; 1 is no limit."""
    if fraction < 1 and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(fraction)


def free_memory(device: torch.device) -> int:
    """Bytes that nobody has taken of a device's memory, a CPU's being the host's."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else free_host_memory()


def room_left(fraction: float, device: torch.device) -> int:
    """Bytes that cache and adapters may take of a limited GPU, once the weights are there."""
    if fraction >= 1 or device.type != "cuda":
        return sys.maxsize
    total = torch.cuda.get_device_properties(device).total_memory
    return max(0, int(fraction * total) - int(torch.cuda.memory_allocated(device)) - STEP_BYTES)


def offload(runner: Any, adapters: Iterable[AdapterWeights]) -> None:
    """Give the device's memory up: graphs and cache are dropped, weights go to the host. On a CPU they stay."""
    if (release_graphs := getattr(runner, "release_graphs", None)) is not None:
        release_graphs()  # they are tied to the addresses of weights and cache
    runner.cache.release()
    move(tensors_of(runner.model, adapters), torch.device("cpu"))
    if runner.device.type == "cuda":
        torch.cuda.empty_cache()


def restore(runner: Any, adapters: Iterable[AdapterWeights]) -> None:
    """Undo `offload`, also one that failed half-way."""
    move(tensors_of(runner.model, adapters), runner.device)
    runner.cache.allocate(runner.num_blocks, runner.dtype)


def tensors_of(model: torch.nn.Module, adapters: Iterable[AdapterWeights]) -> Iterator[torch.Tensor]:
    """Everything that the forward pass reads: parameters, buffers, NF4's statistics, adapters."""
    for parameter in model.parameters():
        yield parameter
        yield from _nf4_state(getattr(parameter, "quant_state", None))
    yield from model.buffers()
    for weights in adapters:
        yield from weights.tensors


def _nf4_state(state: Any) -> Iterator[torch.Tensor]:
    """Of bitsandbytes' QuantState, whose own statistics are quantised once more (state2)."""
    while state is not None:
        yield from (value for value in vars(state).values() if isinstance(value, torch.Tensor))
        state = state.state2


def move(tensors: Iterable[torch.Tensor], device: torch.device) -> None:
    """Move tensors in place, storage by storage: what shared memory, tied or as a view, shares it still.

    Whoever holds one of the tensors sees it moved. Those that came out of inference mode cannot be, and are small.
    """
    storages: dict[int, list[torch.Tensor]] = {}
    for tensor in {id(t): t for t in tensors}.values():
        if tensor.device.type != device.type and not tensor.is_inference():
            storages.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
    for sharing in storages.values():
        moved = sharing[0].untyped_storage().to(device=device)
        for tensor in sharing:
            data = torch.empty(0, dtype=tensor.dtype, device=device)
            tensor.data = data.set_(moved, tensor.storage_offset(), tensor.size(), tensor.stride())
