"""The scheduler alone: no torch, no threads."""

from __future__ import annotations

import random
import subprocess
import sys
from typing import Any

import pytest

from worker.engine.request import Request, SamplingParams
from worker.engine.scheduler import Scheduled, Scheduler


def make(**values: Any) -> Scheduler:
    defaults = {"num_blocks": 64, "block_size": 4, "max_batch": 4, "max_queue": 8, "max_step_tokens": 16}
    return Scheduler(**{**defaults, **values})


def request(name: str, prompt: int, tokens: int = 8, key: str = "") -> Request:
    return Request(name, list(range(1, prompt + 1)), SamplingParams(max_tokens=tokens), key=key)


def run(scheduler: Scheduler, step: list[Scheduled]) -> None:
    """What the engine does with a step: compute, append a token where one is sampled, end at the limit."""
    for s in step:
        scheduler.computed(s)
        if s.samples:
            s.request.output_ids.append(7)
            if len(s.request.output_ids) >= s.request.params.max_tokens:
                scheduler.finish(s.request)


def shape(step: list[Scheduled]) -> dict[str, int]:
    return {s.request.id: s.count for s in step}


def test_a_prompt_runs_in_chunks_and_samples_with_its_last() -> None:
    scheduler = make(max_step_tokens=8)
    scheduler.add(request("a", 20))
    seen = []
    for _ in range(4):
        step = scheduler.schedule()
        seen.append([(s.start, s.count, s.samples) for s in step])
        run(scheduler, step)
    assert seen == [[(0, 8, False)], [(8, 8, False)], [(16, 4, True)], [(20, 1, True)]]


def test_a_long_prompt_does_not_stall_running_requests() -> None:
    scheduler = make(max_step_tokens=8)
    scheduler.add(request("stream", 2, tokens=20))
    run(scheduler, scheduler.schedule())
    scheduler.add(request("long", 60, tokens=1))
    for _ in range(8):
        step = scheduler.schedule()
        assert shape(step)["stream"] == 1
        assert sum(s.count for s in step) <= 8
        run(scheduler, step)
    assert shape(scheduler.schedule())["long"] == 4  # 60 = 8 × 7 + 4: it used all that was left each time


def test_a_step_holds_no_more_than_the_batch_and_the_token_limit() -> None:
    scheduler = make(max_batch=3, max_step_tokens=10)
    for i in range(6):
        scheduler.add(request(str(i), 4))
    step = scheduler.schedule()
    assert shape(step) == {"0": 4, "1": 4, "2": 2}
    assert len(scheduler.waiting) == 3


def test_adapters_take_turns_whatever_the_length_of_their_queues() -> None:
    scheduler = make(max_batch=1, max_queue=20)
    for i in range(5):
        scheduler.add(request(f"flood{i}", 2, tokens=1, key="flood"))
    scheduler.add(request("one", 2, tokens=1, key="one"))
    scheduler.add(request("base", 2, tokens=1))
    order = []
    while scheduler.has_work():
        step = scheduler.schedule()
        order += [s.request.id for s in step]
        run(scheduler, step)
    assert order == ["flood0", "one", "base", "flood1", "flood2", "flood3", "flood4"]


def test_when_memory_runs_out_the_request_admitted_last_is_put_back_and_resumed_first() -> None:
    scheduler = make(num_blocks=4, block_size=4)
    first, second, third = request("first", 7, tokens=9), request("second", 3, tokens=9), request("third", 3, tokens=1)
    for r in (first, second, third):
        scheduler.add(r)
    preempted_at = None
    finished: list[str] = []
    for n in range(60):
        if not scheduler.has_work():
            break
        step = scheduler.schedule()
        assert step, "no progress"
        if scheduler.preemptions and preempted_at is None:
            preempted_at = n
            assert second.blocks == []
            assert second.output_ids  # its tokens are kept
            assert scheduler.waiting.peek() is second  # before "third", which came earlier to the queue's front
        before = {s.request.id for s in step}
        run(scheduler, step)
        finished += [r for r in before if r not in {x.id for x in scheduler.running}]
    assert preempted_at is not None
    assert len(first.output_ids) == len(second.output_ids) == 9
    assert scheduler.pool.free == 4


def test_a_request_alone_is_never_starved_by_its_own_growth() -> None:
    scheduler = make(num_blocks=4, block_size=4)
    alone = request("alone", 8, tokens=8)  # 16 tokens: exactly the memory there is
    scheduler.add(alone)
    while scheduler.has_work():
        run(scheduler, scheduler.schedule())
    assert len(alone.output_ids) == 8
    assert scheduler.preemptions == 0


def test_an_aborted_request_gives_back_its_place_and_memory_at_once() -> None:
    scheduler = make(max_batch=1)
    running, waiting = request("running", 9), request("waiting", 3)
    scheduler.add(running)
    scheduler.add(waiting)
    run(scheduler, scheduler.schedule())
    assert scheduler.pool.free == 64 - 3
    assert scheduler.finish(running)
    assert scheduler.pool.free == 64
    assert shape(scheduler.schedule()) == {"waiting": 3}
    assert not scheduler.finish(running)  # unknown by now


def test_a_waiting_request_can_be_aborted() -> None:
    scheduler = make(max_batch=1)
    a, b, c = request("a", 2, key="x"), request("b", 2, key="x"), request("c", 2, key="x")
    for r in (a, b, c):
        scheduler.add(r)
    scheduler.schedule()
    assert scheduler.finish(b)
    scheduler.finish(a)
    assert shape(scheduler.schedule()) == {"c": 2}


def test_room_counts_what_runs_and_what_waits() -> None:
    scheduler = make(max_batch=2, max_queue=3)
    for i in range(5):
        assert scheduler.room() == 5 - i
        scheduler.add(request(str(i), 2))
        scheduler.schedule()
    assert scheduler.room() == 0


def test_a_request_that_can_never_fit_is_refused() -> None:
    scheduler = make(num_blocks=2, block_size=4)
    with pytest.raises(ValueError, match="5 \\+ 4 tokens exceeds the cache of 8"):
        scheduler.add(request("big", 5, tokens=4))


@pytest.mark.parametrize("seed", range(20))
def test_under_any_load_every_request_ends_and_no_block_is_shared_or_lost(seed: int) -> None:
    rng = random.Random(seed)
    scheduler = make(
        num_blocks=rng.randint(10, 20), block_size=rng.choice([1, 4]), max_batch=4, max_step_tokens=rng.randint(4, 20)
    )
    longest = scheduler.max_tokens
    todo = [
        request(
            str(i), p := rng.randint(1, longest - 2), tokens=rng.randint(1, min(12, longest - p)), key=rng.choice("ab")
        )
        for i in range(30)
    ]
    everything = list(todo)
    aborted: set[str] = set()
    for _ in range(5000):
        while todo and scheduler.room():
            scheduler.add(todo.pop())
        if not scheduler.has_work():
            break
        step = scheduler.schedule()
        assert step, "no progress"
        assert sum(s.count for s in step) <= scheduler.max_step_tokens
        assert len({s.request.id for s in step}) == len(step) <= scheduler.max_batch
        owned = [b for r in scheduler.running for b in r.blocks]
        assert len(owned) == len(set(owned))
        assert len(owned) + scheduler.pool.free == scheduler.pool.num_blocks
        for s in step:
            assert len(s.request.blocks) * scheduler.pool.block_size >= s.start + s.count
        run(scheduler, step)
        if scheduler.running and rng.random() < 0.05:
            victim = rng.choice(scheduler.running)
            scheduler.finish(victim)
            aborted.add(victim.id)
    assert not scheduler.has_work()
    assert scheduler.pool.free == scheduler.pool.num_blocks
    for r in everything:
        assert r.id in aborted or len(r.output_ids) == r.params.max_tokens


def test_the_scheduler_needs_no_torch() -> None:
    code = "import sys, worker.engine.scheduler; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
