"""Whether activations are kept, and how large passes are then: arithmetic alone."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaConfig

from benchmarks.training.overhead import SHAPES
from service.specs import CptSpec, parse_spec
from worker.checkpointing import choose
from worker.memory import GIB, SMALLEST_PASS


def spec(**training: Any) -> CptSpec:
    found = parse_spec(
        {
            "kind": "cpt",
            "adapter": "a",
            "dataset": {"file_id": "file-x", "template": {"prompt": "{text}"}},
            "training": training,
        }
    )
    assert isinstance(found, CptSpec)
    return found


def config(size: str) -> LlamaConfig:
    return LlamaConfig(**SHAPES[size])


def test_a_gpu_computes_activations_again_where_there_is_no_room_for_them() -> None:
    assert not choose(spec(), config("1b"), 2048, 80 * GIB, gpu=True).used
    assert choose(spec(), config("8b"), 2048, 24 * GIB, gpu=True).used
    assert choose(spec(gradient_checkpointing=True), config("1b"), 2048, 80 * GIB, gpu=True).used
    assert not choose(spec(gradient_checkpointing=False), config("8b"), 2048, 24 * GIB, gpu=True).used


def test_a_resumed_run_stays_with_what_it_began_with() -> None:
    assert choose(spec(), config("1b"), 2048, 80 * GIB, gpu=True, before=True).used
    assert not choose(spec(), config("8b"), 2048, 24 * GIB, gpu=True, before=False).used
    assert choose(spec(gradient_checkpointing=True), config("1b"), 2048, 80 * GIB, gpu=True, before=False).used


def test_without_it_passes_are_as_large_as_the_memory_bears() -> None:
    asked = spec(gradient_checkpointing=False)
    room = choose(asked, config("1b"), 2048, 80 * GIB, gpu=True)
    assert room.tokens is None  # the spec's own 8 × 2048
    tight = choose(asked, config("8b"), 2048, 60 * GIB, gpu=True)
    assert tight.tokens is not None
    assert SMALLEST_PASS <= tight.tokens < 8 * 2048
    tighter = choose(asked, config("8b"), 2048, 50 * GIB, gpu=True)
    assert tighter.tokens is not None
    assert tighter.tokens < tight.tokens
    assert choose(asked, config("8b"), 2048, 8 * GIB, gpu=True).tokens == SMALLEST_PASS  # halved, if it does not fit


def test_a_pass_holds_the_longest_row_whatever_the_memory() -> None:
    asked = spec(gradient_checkpointing=False)
    asked = asked.model_copy(update={"model": asked.model.model_copy(update={"max_seq_length": 16384})})
    assert choose(asked, config("8b"), 9000, 8 * GIB, gpu=True).tokens == 9000


def test_a_model_without_an_estimate_is_done_as_asked() -> None:
    other = config("1b")
    other.model_type = "other"
    for asked, used in ((True, True), (False, False), ("auto", True)):
        found = choose(spec(gradient_checkpointing=asked), other, 2048, 80 * GIB, gpu=True)
        assert (found.used, found.tokens) == (used, None)


@pytest.mark.parametrize(("free", "used"), [(80 * GIB, False), (2 * GIB, True)])
def test_a_cpu_keeps_activations_if_they_fit_a_quarter_of_the_free_memory(free: int, used: bool) -> None:
    assert choose(spec(), config("1b"), 256, free, gpu=False).used is used
    assert choose(spec(gradient_checkpointing=True), config("1b"), 256, free, gpu=False).used
