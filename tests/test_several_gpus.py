"""A job on several devices: here two processes on the CPU, over gloo, which learn what one learns with twice the accumulation."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from service.errors import JobFailure
from tests.recipes import assert_same, chats, cpt_spec, ift_spec, run_recipe, texts, weights
from worker import launch
from worker.distributed import buckets
from worker.passes import IGNORE, collate, take
from worker.ranks import shares

TWO = ["cpu", "cpu"]


def with_accumulation(spec: dict[str, Any], steps: int) -> dict[str, Any]:
    return {**spec, "training": {**spec["training"], "gradient_accumulation_steps": steps}}


def ranks_left() -> list[str]:
    """Ranks that this process has started and that still run; the dead ones have no command line."""
    children = [pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()]
    commands = [Path(f"/proc/{pid}/cmdline").read_bytes().decode() for pid in children]
    return [command for command in commands if "worker.rank" in command or "tests.small_rank" in command]


# The rows of a step


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
@pytest.mark.parametrize("lengths", [[5, 17, 3, 3, 30, 1, 12, 8], [4] * 12, [9, 2], []])
def test_every_row_of_a_step_is_one_ranks(lengths: list[int], parts: int) -> None:
    dealt = shares(lengths, parts)
    assert sorted(i for rows in dealt for i in rows) == list(range(len(lengths)))
    if lengths and len(set(lengths)) == 1:
        assert {len(rows) for rows in dealt} <= {len(lengths) // parts, -(-len(lengths) // parts)}


def test_ranks_have_about_the_same_tokens() -> None:
    lengths = [5, 17, 3, 3, 30, 1, 12, 8, 9, 22]
    sums = [sum(lengths[i] for i in rows) for rows in shares(lengths, 2)]
    assert abs(sums[0] - sums[1]) <= 2


@pytest.mark.parametrize("rows", [[0, 2], [1], [], [0, 1, 2]])
def test_a_share_is_a_step_of_its_rows(rows: list[int]) -> None:
    made = [{"input_ids": list(range(n)), "labels": [IGNORE, *range(1, n)]} for n in (4, 7, 2)]
    taken = take(collate(made), rows)
    if rows:
        expected = collate([made[i] for i in rows])
        assert all(torch.equal(taken[k], expected[k]) for k in ("row_lengths", "input_ids", "labels"))
        assert taken["lengths"] == expected["lengths"]
    else:
        assert (taken["lengths"], taken["input_ids"].numel()) == ([], 0)


def test_gradients_are_summed_in_buckets_of_one_dtype_and_large_ones_alone() -> None:
    sizes = [(10, torch.float32), (10, torch.float32), (100, torch.float32), (3, torch.float32), (3, torch.bfloat16)]
    tensors = [torch.zeros(n, dtype=dtype) for n, dtype in sizes]
    found = list(buckets(tensors, size=100))
    assert [[t.numel() for t in bucket] for bucket in found] == [[10, 10], [100], [3], [3]]


# What is learnt


def test_pre_training_learns_the_same_in_two_processes(tiny_base: Path, tmp_path: Path) -> None:
    """With trained embeddings, two epochs, and a last step of each that has one row: none for the second process."""
    file = texts(tmp_path / "rows.jsonl", n=52, words=8)
    spec = cpt_spec(
        tiny_base,
        lora={"train_embeddings": True},
        training={
            "max_steps": -1,
            "num_train_epochs": 2,
            "eval_steps": 5,
            "load_best_model_at_end": True,
            "save_steps": 5,
        },
    )
    one = run_recipe(with_accumulation(spec, 2), tmp_path / "one", file=file)
    two = run_recipe(with_accumulation(spec, 1), tmp_path / "two", file=file, devices=TWO)
    assert one.progress.records["data"]["train_rows"] % 8 == 1
    assert (one.progress.records["processes"], two.progress.records["processes"]) == (1, 2)
    assert two.outcome.ended == "done"
    assert_same(one, two)
    assert {p.name for p in one.checkpoints.iterdir()} == {p.name for p in two.checkpoints.iterdir()}


def test_instructions_padded_learn_the_same_in_two_processes(tiny_base: Path, tmp_path: Path) -> None:
    file = chats(tmp_path / "chats.jsonl")
    spec = ift_spec(tiny_base, training={"per_device_train_batch_size": 3, "train_on_responses_only": True})
    one = run_recipe(with_accumulation(spec, 4), tmp_path / "one", file=file)
    two = run_recipe(with_accumulation(spec, 2), tmp_path / "two", file=file, devices=TWO)
    assert_same(one, two)


def test_a_pause_stops_both_and_either_number_goes_on(tiny_base: Path, tmp_path: Path) -> None:
    file = texts(tmp_path / "rows.jsonl")
    spec = cpt_spec(tiny_base, training={"save_steps": 100})
    one = run_recipe(with_accumulation(spec, 2), tmp_path / "one", file=file)
    paused = run_recipe(spec, tmp_path / "two", file=file, devices=TWO, ask_at=(2, "pause"))
    assert paused.outcome.ended == "pause"
    assert list(paused.progress.present) == [2]
    # The second pause comes in the evaluation after step 3, which is made up for by whoever goes on.
    again = run_recipe(spec, tmp_path / "two", file=file, devices=TWO, ask_at=(4, "pause"))
    assert (again.outcome.ended, again.progress.resumed_from) == ("pause", 2)
    alone = run_recipe(with_accumulation(spec, 2), tmp_path / "two", file=file)
    assert (alone.outcome.ended, alone.progress.resumed_from) == ("done", 3)
    # All of them from what one process of the first attempt has tokenised.
    assert [run.progress.records["preparation"]["cache"] for run in (again, alone)] == ["hit", "hit"]
    assert len(list((tmp_path / "two" / "data" / "tokens").glob("*.arrow"))) == 1
    assert alone.progress.eval_losses[3] == pytest.approx(one.progress.eval_losses[3], abs=1e-4)
    for run in (paused, again, alone):
        for step, loss in run.progress.losses.items():
            assert loss == pytest.approx(one.progress.losses[step], abs=1e-4)
    theirs = weights(alone)
    assert all(torch.allclose(weight, theirs[name], atol=2e-4) for name, weight in weights(one).items())


def test_what_is_asked_before_training_ends_both(tiny_base: Path, tmp_path: Path) -> None:
    from worker.outcome import Interrupted

    file = texts(tmp_path / "rows.jsonl")
    with pytest.raises(Interrupted, match="cancel"):
        run_recipe(cpt_spec(tiny_base), tmp_path, file=file, devices=TWO, ask_at=(1, "cancel"))
    assert not ranks_left()


# What goes wrong at one of them


def with_fault(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    monkeypatch.setattr(launch, "MODULE", "tests.small_rank")
    monkeypatch.setenv("TEST_RANK_FAULT", fault)


def test_out_of_memory_at_one_makes_the_passes_of_both_smaller_and_changes_nothing_else(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = chats(tmp_path / "chats.jsonl")
    spec = ift_spec(tiny_base, training={"max_steps": 3, "eval_steps": 3})
    one = run_recipe(with_accumulation(spec, 2), tmp_path / "one", file=file)
    with_fault(monkeypatch, "memory")
    two = run_recipe(spec, tmp_path / "two", file=file, devices=TWO)
    assert_same(one, two)
    assert any("out of memory in training" in m and "at rank 1" in m for m in two.progress.logged)
    assert two.progress.records["passes"]["train"]["rows"] < 4


def test_a_rank_that_is_killed_fails_the_run_and_is_named(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_fault(monkeypatch, "killed")
    file = texts(tmp_path / "rows.jsonl")
    with pytest.raises(JobFailure) as caught:
        run_recipe(cpt_spec(tiny_base), tmp_path, file=file, devices=TWO)
    failure = caught.value
    assert (failure.code, failure.retry) == ("worker_killed", True)
    assert "rank 1 of 2" in failure.message
    assert "SIGKILL" in failure.message
    assert "the last thing that rank 1 said" in failure.message
    assert not ranks_left()


def test_an_error_at_one_is_the_runs_and_not_what_the_others_make_of_it(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_fault(monkeypatch, "error")
    file = texts(tmp_path / "rows.jsonl")
    with pytest.raises(JobFailure, match="rank 1 has had enough") as caught:
        run_recipe(cpt_spec(tiny_base), tmp_path, file=file, devices=TWO)
    assert caught.value.code == "internal_error"
    assert not ranks_left()


def test_a_failure_is_the_same_in_another_process() -> None:
    failure = JobFailure("invalid_data", "bad rows", [{"row": 3}], retry=True)
    other = pickle.loads(pickle.dumps(failure))
    assert (other.body(), other.retry, str(other)) == (failure.body(), True, "bad rows")


def test_bad_data_fails_as_in_one_process(tiny_base: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"title": "a"}\n')
    with pytest.raises(JobFailure) as caught:
        run_recipe(cpt_spec(tiny_base), tmp_path, file=file, devices=TWO)
    assert caught.value.code == "invalid_data"
    assert "LORRY_RANK_SOCKET" not in os.environ
