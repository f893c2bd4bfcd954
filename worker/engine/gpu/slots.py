"""The table through which kernels find adapters: addresses, ranks and scalings, by slot and site.

An adapter's matrices stay where they were loaded. Captured graphs keep reading the same table, so that an adapter comes in
by three small copies, in order with the steps around it: nothing is captured again and nothing waits.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict

import torch

from worker.engine.gpu.lora import MAX_RANK
from worker.engine.lora import AdapterWeights


class AdapterSlots:
    """Slots of the adapters in use. Only the engine's thread calls it."""

    def __init__(self, sites: list[str], outside: set[str], capacity: int, dtype: torch.dtype, device: torch.device):
        """`sites`: names of the products in the order of the kernels' site numbers; `outside`: sites that others serve."""
        self.sites = sites
        self.capacity = capacity
        self.addresses = torch.zeros(capacity, 2, len(sites), dtype=torch.int64, device=device)
        self.ranks = torch.zeros(capacity, len(sites), dtype=torch.int32, device=device)
        self.scalings = torch.zeros(capacity, len(sites), dtype=torch.float32, device=device)
        self._inside, self._outside = frozenset(sites), outside
        self._fit: weakref.WeakKeyDictionary[AdapterWeights, bool] = weakref.WeakKeyDictionary()
        self._dtype = dtype
        # Weak: an adapter that was evicted and has no request left gives its memory back.
        # By slot, least recently used first.
        self._owners: OrderedDict[int, weakref.ref[AdapterWeights]] = OrderedDict()
        self._slots: weakref.WeakKeyDictionary[AdapterWeights, int] = weakref.WeakKeyDictionary()

    def fits(self, weights: AdapterWeights | None) -> bool:
        """Whether the kernels can serve it: no trained bias, a rank they take, products they know."""
        if weights is None:
            return True
        if (known := self._fit.get(weights)) is None:
            known = self._fit[weights] = not weights.bias and all(
                name in self._outside
                or (name in self._inside and p.b.shape[1] <= MAX_RANK and p.a.dtype == self._dtype)
                for name, p in weights.pairs.items()
            )
        return known

    def assign(self, adapters: list[AdapterWeights | None]) -> dict[AdapterWeights, int]:
        """Slots for all the adapters of a step, the new ones written to the table. Distinct ones are at most `capacity`."""
        wanted = {a: self._slots.get(a) for a in adapters if a is not None}
        taken = {slot for slot in wanted.values() if slot is not None}
        for slot in taken:
            self._owners.move_to_end(slot)
        found: dict[AdapterWeights, int] = {}
        for adapter, held in wanted.items():
            slot = self._free(taken) if held is None else held
            if held is None:
                self._write(slot, adapter)
                taken.add(slot)
            found[adapter] = slot
        return found

    def forget(self) -> None:
        """Hold no adapter: theirs have been moved, or will be."""
        self._owners.clear()
        self._slots.clear()

    def _free(self, taken: set[int]) -> int:
        if len(self._owners) < self.capacity:
            return len(self._owners)
        dead = next((s for s, owner in self._owners.items() if owner() is None), None)
        if dead is not None:
            return dead
        return next(s for s in self._owners if s not in taken)

    def _write(self, slot: int, adapter: AdapterWeights) -> None:
        previous = self._owners.pop(slot, lambda: None)()
        if previous is not None:
            self._slots.pop(previous, None)
        self._owners[slot] = weakref.ref(adapter)
        self._slots[adapter] = slot
        pairs = [adapter.pairs.get(name) for name in self.sites]
        pin = self.addresses.is_cuda
        for table, values in (
            (
                self.addresses,
                [[p.a.data_ptr() if p else 0 for p in pairs], [p.b.data_ptr() if p else 0 for p in pairs]],
            ),
            (self.ranks, [p.b.shape[1] if p else 0 for p in pairs]),
            (self.scalings, [p.scaling if p else 0.0 for p in pairs]),
        ):
            row = torch.tensor(values, dtype=table.dtype, pin_memory=pin)
            table[slot].copy_(row, non_blocking=True)
