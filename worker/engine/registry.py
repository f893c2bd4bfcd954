"""Adapters by name, kept while they are used: the least recently used leave the device first.

On a GPU an adapter stays in the host's memory, as far as that has room, and comes back from there in one copy. Reading
happens outside the engine's thread. A request holds its adapter's weights, so an eviction or an unload never touches one
that is running; the memory goes with the last request that uses it.
"""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from service.errors import Conflict, NotFound, Unavailable
from service.settings import Settings
from worker.devices import free_host_memory
from worker.engine.adapters import Adapter, BaseInfo, fingerprint, read_adapter
from worker.engine.sleep import STEP_BYTES, free_memory, room_left
from worker.engine.transfer import on_device


@dataclass(frozen=True, slots=True)
class Room:
    """How much is kept: adapters and their bytes on a device, and, if that is a GPU, bytes of their copies on the host."""

    adapters: int
    bytes: int = sys.maxsize
    host_bytes: int = 0


def room_for(settings: Settings, device: torch.device) -> Room:
    """As the settings say, or a part of what is free once base and cache have theirs.

    That is half of a GPU's memory, all of the host's that a CPU computes from, and of the host's beside a GPU a quarter. Where
    a limited GPU has nothing left, half of what the cache leaves for steps: it is not nothing, or no adapter came in.
    """
    host = settings.engine_adapter_host_bytes
    if host is None:
        host = free_host_memory() // 4
    free = free_memory(device) // (2 if device.type == "cuda" else 1)
    left = max(min(free, room_left(settings.engine_memory_fraction, device)), STEP_BYTES // 2)
    return Room(settings.engine_max_adapters, settings.engine_adapter_bytes or left, host)


class AdapterRegistry:
    """Names → adapters. One that left the device comes back when a request names it."""

    def __init__(
        self,
        base: BaseInfo,
        room: Room,
        install: Callable[[set[str]], None],
        on_evict: Callable[[], None] = lambda: None,
        on_read: Callable[[str], None] = lambda source: None,
        open_folder: Callable[[str | Path], AbstractContextManager[Path]] | None = None,
    ) -> None:
        """`open_folder` gives the folder that an address stands for; without it, an address is a path.

        `on_read` is told where an adapter came from, "disk" or "host".
        """
        self.base = base
        self.gate: Callable[[], None] = lambda: None  # raises while nothing may be read onto the device
        self.room = room
        self._open_folder = open_folder or (lambda address: nullcontext(Path(address).absolute()))
        self._on_evict, self._on_read = on_evict, on_read
        self._install = install
        self._addresses: dict[str, str | Path] = {}  # of every adapter that was loaded and not unloaded since
        self._pinned: set[str] = set()
        self._held: OrderedDict[str, Adapter] = OrderedDict()  # least recently used first
        self._on_host: OrderedDict[str, Adapter] = OrderedDict()  # likewise; on a GPU
        self._lock = threading.Lock()
        self._reading = threading.Lock()  # one at a time: reads compete for the disk and for the decoder's CPU

    def held(self) -> list[Adapter]:
        """Adapters on the device, the least recently used first."""
        with self._lock:
            return list(self._held.values())

    def pinned(self, name: str) -> bool:
        return name in self._pinned

    def peek(self, name: str) -> Adapter | None:
        """The adapter if it is on the device; counts as a use."""
        with self._lock:
            adapter = self._held.get(name)
            if adapter is not None:
                self._held.move_to_end(name)
            return adapter

    def get(self, name: str) -> Adapter:
        """The adapter, fetched again if it had been evicted. May take as long as the disk; raises NotFound (model_not_found)."""
        adapter = self.peek(name)
        if adapter is not None:
            return adapter
        with self._lock:
            address = self._addresses.get(name)
        if address is None:
            raise NotFound(f"the model {name!r} does not exist", param="model", code="model_not_found")
        try:
            return self.load(name, address)
        except NotFound as error:
            with self._lock:
                self._addresses.pop(name, None)
            raise NotFound(
                f"the model {name!r} does not exist: {error.message}", param="model", code="model_not_found"
            ) from error

    def load(self, name: str, address: str | Path, pinned: bool | None = None) -> Adapter:
        """Read a folder under `name`, in place of what had the name. Nothing is read if the same files are held already.

        `pinned`: whether it is to stay whatever others need; None leaves that as it is. Raises what `read_adapter` and the
        gate raise, NotFound for an address without a folder, StorageUnavailable, Conflict (no_room_for_adapter), and Unavailable
        (no_memory_for_adapter); what had the name stays then.
        """
        with self._reading, self._folder(address) as path:
            adapter = self.peek(name)
            if adapter is None or adapter.path != path or adapter.fingerprint != fingerprint(path):
                adapter = self._fetch(name, path)
            with self._lock:
                self._addresses[name] = address
                if pinned is not None:
                    (self._pinned.add if pinned else self._pinned.discard)(name)
            return adapter

    def _fetch(self, name: str, path: Path) -> Adapter:
        with self._lock:
            host = self._on_host.get(name)
        if host is None or host.path != path or host.fingerprint != fingerprint(path):
            host = read_adapter(name, path, self.base)
            self._on_read("disk")
        else:
            self._on_read("host")
        self._make_room(host)
        try:
            adapter = replace(host, weights=on_device(host.weights, self.base.device))
        except torch.OutOfMemoryError as error:  # a job on the same GPU may have it
            raise Unavailable(
                f"the GPU has no memory for adapter {name} now, {_mib(host.bytes)}; something else on it has the rest",
                code="no_memory_for_adapter",
            ) from error
        self._install(adapter.weights.sites)
        with self._lock:
            self._held[name] = adapter
            self._held.move_to_end(name)
            if adapter.weights is not host.weights:
                self._on_host[name] = host
                self._on_host.move_to_end(name)
                while self._on_host and sum(a.bytes for a in self._on_host.values()) > self.room.host_bytes:
                    self._on_host.popitem(last=False)
        return adapter

    def _make_room(self, new: Adapter) -> None:
        """Let the least recently used go, but for the pinned ones. Raises Conflict (no_room_for_adapter) before any has."""
        with self._lock:
            others = {name: a.bytes for name, a in self._held.items() if name != new.name}
            count, size, leaving = len(others) + 1, sum(others.values()) + new.bytes, []
            for name, freed in others.items():
                if count <= self.room.adapters and size <= self.room.bytes:
                    break
                if name not in self._pinned:
                    leaving.append(name)
                    count, size = count - 1, size - freed
            if count > self.room.adapters or size > self.room.bytes:
                stay = (
                    f"{count - 1} pinned ones take {_mib(size - new.bytes)}" if count > 1 else "nothing else is there"
                )
                raise Conflict(
                    f"no room for adapter {new.name} of {_mib(new.bytes)}: {stay}; the engine keeps {self.room.adapters} "
                    f"adapters (LORRY_ENGINE_MAX_ADAPTERS) of {_mib(self.room.bytes)} in all (LORRY_ENGINE_ADAPTER_BYTES)",
                    code="no_room_for_adapter",
                )
            for name in leaving:
                del self._held[name]
                self._on_evict()

    def settle(self) -> None:
        """Wait until nothing is being read; with the gate closed, nothing is from then on."""
        with self._reading:
            pass

    @contextmanager
    def _folder(self, address: str | Path) -> Iterator[Path]:
        self.gate()
        with ExitStack() as stack:
            try:
                path = stack.enter_context(self._open_folder(address))
            except FileNotFoundError as error:
                raise NotFound(f"no adapter found at {address}: {error}", code="adapter_not_found") from error
            yield path

    def unload(self, name: str) -> None:
        """Forget a name. Raises NotFound (model_not_found)."""
        with self._lock:
            known = self._addresses.pop(name, None)
            self._held.pop(name, None)
            self._on_host.pop(name, None)
            self._pinned.discard(name)
        if known is None:
            raise NotFound(f"the adapter {name!r} is not loaded", param="lora_name", code="model_not_found")


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"
