"""Which tokens run in the next step. Pure Python: no torch, no threads, no clock beyond the requests' own.

A step carries one token of every decoding request and chunks of prompts up to `max_step_tokens` tokens in all, so that a
long prompt never stalls running streams. Key-value memory is a fixed number of blocks; a request takes blocks as it grows.
When none is left, the request admitted last gives its blocks back and is computed again later (preemption by
recomputation); its tokens are kept, so the client notices nothing but a pause.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from dataclasses import dataclass

from worker.engine.request import Request


@dataclass(frozen=True, slots=True)
class Scheduled:
    """Tokens start…start+count-1 of a request run in this step; `samples` if its next token comes out of it."""

    request: Request
    start: int
    count: int
    samples: bool


class BlockPool:
    """Free list of cache blocks. The block freed last is used first: its memory is warm."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError("num_blocks and block_size are at least 1")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def free(self) -> int:
        return len(self._free)

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def grow(self, request: Request, tokens: int) -> bool:
        """Give `request` blocks for its first `tokens` tokens; all or none. Returns whether it worked."""
        need = self.blocks_for(tokens) - len(request.blocks)
        if need > len(self._free):
            return False
        for _ in range(need):
            request.blocks.append(self._free.pop())
        return True

    def release(self, request: Request) -> None:
        self._free.extend(reversed(request.blocks))
        request.blocks = []  # a new list: whoever remembers the old one's blocks sees that they are others


class WaitingQueue:
    """First in, first out within a key; keys take turns, so that a flood for one adapter does not hold up the others.

    Preempted requests come before all.
    """

    def __init__(self) -> None:
        self._resumed: deque[Request] = deque()
        self._by_key: OrderedDict[str, deque[Request]] = OrderedDict()
        self._len = 0

    def __len__(self) -> int:
        return self._len

    def push(self, request: Request) -> None:
        self._by_key.setdefault(request.key, deque()).append(request)
        self._len += 1

    def push_resumed(self, request: Request) -> None:
        self._resumed.appendleft(request)
        self._len += 1

    def peek(self) -> Request | None:
        if self._resumed:
            return self._resumed[0]
        return next(iter(self._by_key.values()))[0] if self._by_key else None

    def pop(self) -> Request:
        self._len -= 1
        if self._resumed:
            return self._resumed.popleft()
        key, requests = next(iter(self._by_key.items()))
        request = requests.popleft()
        if requests:
            self._by_key.move_to_end(key)
        else:
            del self._by_key[key]
        return request

    def remove(self, request: Request) -> bool:
        if request in self._resumed:
            self._resumed.remove(request)
        elif request in self._by_key.get(request.key, ()):
            self._by_key[request.key].remove(request)
            if not self._by_key[request.key]:
                del self._by_key[request.key]
        else:
            return False
        self._len -= 1
        return True


class Scheduler:
    """Admission, batching, memory and preemption. Call `schedule`, run the step, then `computed`, `finish` as needed."""

    def __init__(
        self, *, num_blocks: int, block_size: int, max_batch: int, max_queue: int, max_step_tokens: int
    ) -> None:
        if max_step_tokens < max_batch:
            raise ValueError("max_step_tokens is at least max_batch: every decoding request runs in every step")
        self.pool = BlockPool(num_blocks, block_size)
        self.max_batch = max_batch
        self.max_queue = max_queue
        self.max_step_tokens = max_step_tokens
        self.waiting = WaitingQueue()
        self.running: list[Request] = []  # in order of admission
        self.preemptions = 0

    @property
    def max_tokens(self) -> int:
        """Longest request that fits the cache alone, in tokens."""
        return self.pool.num_blocks * self.pool.block_size

    def room(self) -> int:
        """Requests that may still come in: what the batch and the queue can hold less what is in flight."""
        return max(0, self.max_batch + self.max_queue - len(self.running) - len(self.waiting))

    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, request: Request) -> None:
        """Queue a request; the caller has checked `room`. Raises ValueError if it could never fit the cache."""
        if len(request.prompt_ids) + request.params.max_tokens > self.max_tokens:
            wanted = f"{len(request.prompt_ids)} + {request.params.max_tokens}"
            raise ValueError(f"a request of {wanted} tokens exceeds the cache of {self.max_tokens}")
        self.waiting.push(request)

    def schedule(self) -> list[Scheduled]:
        """The next step: decoding requests first, then chunks of prompts already begun, then new requests."""
        step: list[Scheduled] = []
        budget = self.max_step_tokens
        for request in list(self.running):  # decode: one token each, whatever the prompts want
            if request.num_tokens - request.computed == 1 and self._make_room(request, request.num_tokens):
                step.append(Scheduled(request, request.computed, 1, True))
                budget -= 1
        for request in list(self.running):
            if budget <= 0:
                break
            if request.num_tokens - request.computed > 1:
                budget -= self._chunk(request, budget, step)
        while budget > 0 and len(self.running) < self.max_batch:
            head = self.waiting.peek()
            # The whole prompt has to fit now (plus its first new token): half a prompt in memory helps nobody.
            if head is None or self.pool.blocks_for(head.num_tokens + 1) > self.pool.free:
                break
            request = self.waiting.pop()
            if request.scheduled_at is None:
                request.scheduled_at = time.monotonic()
            self.running.append(request)
            self.pool.grow(request, request.num_tokens)
            budget -= self._chunk(request, budget, step)
        return step

    def ahead(self) -> list[Scheduled]:
        """The step after one whose tokens are still on their way: one more token of each request that goes on by its length.

        Empty if that step takes more than decoding: a prompt to go on with, a place for a waiting request, a preemption. A
        request that its pending token ends runs once too often, and that token is for nobody.
        """
        if self.waiting and len(self.running) < self.max_batch:
            return []
        going = [r for r in self.running if len(r.output_ids) + r.pending < r.params.max_tokens]
        if any(r.num_tokens - r.computed != 1 for r in self.running):
            return []
        if sum(self.pool.blocks_for(r.num_tokens) - len(r.blocks) for r in going) > self.pool.free:
            return []
        for request in going:
            self.pool.grow(request, request.num_tokens)
        return [Scheduled(r, r.computed, 1, True) for r in going]

    def computed(self, scheduled: Scheduled) -> None:
        """The step has written the keys and values of `scheduled`."""
        scheduled.request.computed = scheduled.start + scheduled.count

    def preempt_all(self) -> int:
        """Put every running request back, in its order: the cache is about to go. Returns how many there were."""
        count = len(self.running)
        while self.running:
            self._preempt(self.running[-1])
        return count

    def finish(self, request: Request) -> bool:
        """Forget a request, done or aborted, and free its place and memory. Returns whether it was known."""
        if request in self.running:
            self.running.remove(request)
            self.pool.release(request)
            return True
        return self.waiting.remove(request)

    def _chunk(self, request: Request, budget: int, step: list[Scheduled]) -> int:
        left = request.num_tokens - request.computed
        count = min(left, budget)
        step.append(Scheduled(request, request.computed, count, count == left))
        return count

    def _make_room(self, request: Request, tokens: int) -> bool:
        """Blocks for `tokens` tokens of a running request, at the cost of those admitted after it, at last of itself."""
        while request in self.running:
            if self.pool.grow(request, tokens):
                return True
            self._preempt(self.running[-1])
        return False

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self.pool.release(request)
        request.computed = 0
        self.waiting.push_resumed(request)
        self.preemptions += 1
