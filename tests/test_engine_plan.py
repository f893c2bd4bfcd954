"""What a step's index arrays hold, and which captured shape a step takes. No GPU and no Triton."""

from __future__ import annotations

import numpy
import pytest

from worker.engine.gpu import plan
from worker.engine.request import Request, SamplingParams
from worker.engine.scheduler import Scheduled, Scheduler


def request(prompt: int, outputs: int, blocks: list[int], pending: int = 0) -> Request:
    made = Request(f"{prompt}", list(range(100, 100 + prompt)), SamplingParams(max_tokens=99))
    made.output_ids, made.blocks, made.pending = list(range(outputs)), blocks, pending
    return made


def arrays(shape: plan.Shape) -> plan.Arrays:
    return shape.views(numpy.full(shape.size, 77, dtype=numpy.int32))


@pytest.mark.parametrize("most", [1, 2, 5, 16, 100, 256, 300, 512])
def test_every_batch_has_a_bucket_and_wastes_at_most_half_of_it(most: int) -> None:
    sizes = plan.buckets(most)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == most
    for rows in range(1, most + 1):
        found = plan.bucket_of(rows, sizes)
        assert found is not None
        assert rows <= found < 2 * rows or found <= 2
    assert plan.bucket_of(most + 1, sizes) is None


def test_neighbours_of_one_adapter_are_cut_into_tiles_and_the_base_gets_none() -> None:
    slots, counts = [-1, 3, 3, 0, -1, 3], [2, 10, 9, 1, 4, 1]
    assert plan.lora_tiles(slots, counts, 16) == [(2, 18, 3), (18, 21, 3), (21, 22, 0), (26, 27, 3)]
    assert plan.lora_tiles([-1, -1], [5, 1], 16) == []


@pytest.mark.parametrize(("most", "sizes"), [(96, [64, 96]), (2048, [64, 128, 256, 512, 1024, 2048]), (16, [16])])
def test_steps_with_prompts_have_buckets_up_to_what_takes_longer_to_run_than_to_launch(
    most: int, sizes: list[int]
) -> None:
    assert plan.chunk_buckets(most) == sizes
    assert plan.chunk_buckets(4096)[-1] == 2048


def test_a_bucket_of_chunks_has_room_for_any_mix_of_decodes_and_prompts() -> None:
    shape = plan.chunk_shape(128, 8, 3, 4, 64)
    counts, owners = [1] * 7 + [121], [0, 0, 1, 1, 2, 2, 2, 1]  # decodes sorted by adapter, then a prompt
    assert len(plan.lora_tiles(owners, counts, plan.MIXED_TILE)) <= shape.lora_tiles
    found = plan.query_tiles([(sum(counts[:i]), c, 0) for i, c in enumerate(counts)], 64)
    assert len(found) <= shape.query_tiles
    assert shape.chunks == 8
    array = numpy.full((4, 3), 5)
    plan.fill_tiles(array, [(0, 1, 2)])
    assert array.tolist() == [[0, 1, 2], [-1, -1, -1], [-1, -1, -1], [-1, -1, -1]]


@pytest.mark.parametrize(("rows", "adapters"), [(1, 8), (8, 8), (64, 8), (256, 16), (256, 300)])
def test_a_bucket_has_room_for_the_tiles_of_any_mix_of_its_adapters(rows: int, adapters: int) -> None:
    worst = sorted((i % min(rows, adapters)) for i in range(rows))
    uneven = sorted(0 if i < rows - adapters + 1 else i for i in range(rows))
    for slots in (worst, uneven):
        assert len(plan.lora_tiles(slots, [1] * rows, plan.DECODE_TILE)) <= plan.tile_limit(rows, adapters)


def test_chunks_are_cut_into_tiles_of_queries() -> None:
    assert plan.query_tiles([(2, 70, 0), (72, 3, 40)], 64) == [(2, 66, 0, 0), (66, 72, 0, 64), (72, 75, 1, 40)]


def test_decodes_fill_their_rows_and_padding_rows_touch_nothing() -> None:
    a = arrays(plan.Shape(4, 4, 0, 4, 3, 0, 3))
    one, two = request(20, 1, [5, 6]), request(3, 1, [9], pending=1)  # the second's token is still on the device
    step = [Scheduled(one, 20, 1, True), Scheduled(two, 4, 1, True)]
    known: list[plan.Written] = []
    plan.fill_decodes(a, step, [2, -1], 16, known)
    assert a.ids.tolist() == [0, 0, 0, 0]
    assert a.positions.tolist() == [20, 4, 0, 0]
    assert a.slots.tolist() == [6 * 16 + 4, 9 * 16 + 4, -1, -1]
    assert a.owners.tolist() == [2, -1, -1, -1]
    assert a.lengths.tolist() == [21, 5, 0, 0]
    assert a.tables[0, :2].tolist() == [5, 6]
    assert a.tables[1, 0] == 9


def test_a_block_table_is_written_again_only_where_it_has_changed() -> None:
    a = arrays(plan.Shape(2, 2, 0, 2, 2, 0, 3))
    one, two = request(16, 1, [5, 6]), request(3, 1, [9])
    step = [Scheduled(one, 16, 1, True), Scheduled(two, 3, 1, True)]
    known: list[plan.Written] = []
    plan.fill_decodes(a, step, [-1, -1], 16, known)
    a.tables[:] = 0
    two.blocks.append(3)
    plan.fill_decodes(a, step, [-1, -1], 16, known)
    assert a.tables.tolist() == [[0, 0, 0], [9, 3, 0]]
    plan.fill_decodes(a, step[::-1], [-1, -1], 16, known)
    assert a.tables[:, :2].tolist() == [[9, 3], [5, 6]]


def test_chunks_stand_behind_the_decodes() -> None:
    a = arrays(plan.Shape(6, 1, 2, 2, 0, 2, 2))
    first, second = request(30, 0, [4, 2]), request(2, 0, [7])
    step = [Scheduled(first, 14, 3, False), Scheduled(second, 0, 2, True)]
    assert plan.fill_chunks(a, step, [1, -1], 16, 1) == [(1, 3, 14), (4, 2, 0)]
    assert a.ids[1:].tolist() == [114, 115, 116, 100, 101]
    assert a.positions[1:].tolist() == [14, 15, 16, 0, 1]
    assert a.slots[1:].tolist() == [4 * 16 + 14, 4 * 16 + 15, 2 * 16, 7 * 16, 7 * 16 + 1]
    assert a.owners[1:].tolist() == [1, 1, 1, -1, -1]
    assert a.tables[1].tolist() == [4, 2]


def test_the_arrays_of_a_step_are_one_block_of_memory() -> None:
    shape = plan.Shape(3, 2, 1, 2, 2, 1, 4)
    block = numpy.zeros(shape.size, dtype=numpy.int32)
    views = shape.views(block)
    for i, name in enumerate(shape.sections):
        getattr(views, name)[...] = i + 1
    counts = [int((block == i + 1).sum()) for i in range(len(shape.sections))]
    assert counts == [3, 3, 3, 3, 2, 2, 6, 4, 12]
    assert (block == 0).sum() == 4 * 1 + 2 * 2 + 2  # each section but the last two ends in padding


def make_scheduler(**limits: int) -> Scheduler:
    defaults = {"num_blocks": 8, "block_size": 4, "max_batch": 4, "max_queue": 9, "max_step_tokens": 16}
    return Scheduler(**{**defaults, **limits})


def launch(step: list[Scheduled], scheduler: Scheduler) -> None:
    for s in step:
        scheduler.computed(s)
        if s.samples:
            s.request.pending += 1


def test_every_array_of_a_step_begins_at_a_multiple_of_16_bytes() -> None:
    """Triton compiles a kernel again, for a second or so, when a pointer is aligned otherwise than before."""
    for odd in range(1, 6):
        shape = plan.Shape(odd, odd, odd, odd, odd, odd, odd)
        block = numpy.zeros(shape.size, dtype=numpy.int32)
        for name in shape.sections:
            offset = getattr(shape.views(block), name).ctypes.data - block.ctypes.data
            assert offset % 16 == 0, (name, odd, offset)


def test_a_step_ahead_goes_on_with_tokens_that_are_not_known_yet() -> None:
    scheduler = make_scheduler()
    one, two = (Request(str(i), [1] * 3, SamplingParams(max_tokens=m)) for i, m in enumerate((5, 1)))
    scheduler.add(one)
    scheduler.add(two)
    launch(scheduler.schedule(), scheduler)
    ahead = scheduler.ahead()
    # The second ends with the token that is on its way.
    assert [(s.request, s.start, s.count) for s in ahead] == [(one, 3, 1)]
    assert len(one.blocks) == 1
    launch(ahead, scheduler)
    assert [s.start for s in scheduler.ahead()] == [4]
    assert len(one.blocks) == 2


def test_no_step_ahead_where_a_prompt_a_waiting_request_or_a_preemption_comes_first() -> None:
    scheduler = make_scheduler(max_step_tokens=4)
    scheduler.add(Request("long", [1] * 6, SamplingParams(max_tokens=9)))
    launch(scheduler.schedule(), scheduler)  # four of its six tokens
    assert scheduler.ahead() == []
    scheduler = make_scheduler()
    scheduler.add(Request("first", [1] * 3, SamplingParams(max_tokens=9)))
    launch(scheduler.schedule(), scheduler)
    scheduler.add(Request("waiting", [1] * 3, SamplingParams(max_tokens=9)))
    assert scheduler.ahead() == []
    scheduler = make_scheduler(num_blocks=2)
    for name in ("a", "b"):
        scheduler.add(Request(name, [1] * 3, SamplingParams(max_tokens=4)))
    launch(scheduler.schedule(), scheduler)
    launch(ahead := scheduler.ahead(), scheduler)
    assert len(ahead) == 2
    assert scheduler.ahead() == []  # the next tokens want two more blocks
