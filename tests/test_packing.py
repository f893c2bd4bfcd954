"""Rows in passes: packed or padded, in as many passes as the memory bears, what is learnt is the same."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from service.errors import JobFailure
from service.specs import parse_spec
from tests.recipes import Run, assert_same, cpt_spec, ift_spec, run_recipe
from worker.passes import ALIGN, IGNORE, Capacity, collate, inputs_of, passes_of

LENGTHS = [5, 17, 3, 3, 30, 1, 12, 8]


def rows_of(lengths: list[int]) -> list[dict[str, Any]]:
    rnd = random.Random(0)
    ids = [[rnd.randrange(1, 500) for _ in range(n)] for n in lengths]
    return [{"input_ids": row, "labels": [IGNORE, *row[1:]]} for row in ids]


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations of very different lengths, some longer than the window."""
    rnd = random.Random(3)
    path = tmp_path_factory.mktemp("talks") / "talks.jsonl"
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "then", "came", "to", "be", "read"]
    chats = [
        [
            {"role": "user", "content": " ".join(rnd.choices(words, k=rnd.choice([1, 4, 12])))},
            {"role": "assistant", "content": " ".join(rnd.choices(words, k=rnd.choice([2, 9, 60])))},
        ]
        for _ in range(60)
    ]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return path


# Passes


@pytest.mark.parametrize("capacity", [Capacity(True, 4, 32), Capacity(True, 4, 10), Capacity(False, 3, 0)])
def test_every_row_is_in_one_pass_in_its_order(capacity: Capacity) -> None:
    found = [i for rows in capacity.split(LENGTHS) for i in rows]
    assert found == list(range(len(LENGTHS)))


def test_a_packed_pass_holds_no_more_tokens_than_it_may_but_for_a_row_that_is_longer_alone() -> None:
    for tokens in range(1, 90):
        for rows in Capacity(True, 1, tokens).split(LENGTHS):
            assert len(rows) == 1 or sum(LENGTHS[i] for i in rows) <= tokens


def test_passes_are_as_few_as_fit_and_then_even() -> None:
    assert [len(r) for r in Capacity(True, 1, 100).split([10] * 12)] == [6, 6]  # not ten rows and two


@pytest.mark.parametrize("capacity", [Capacity(True, 4, 79), Capacity(False, 8, 0)])
def test_halving_ends_at_single_rows(capacity: Capacity) -> None:
    sizes = [len(capacity.split(LENGTHS))]
    while capacity.halve(LENGTHS):
        sizes.append(len(capacity.split(LENGTHS)))
    assert sizes == sorted(sizes)
    assert sizes[-1] == len(LENGTHS)


@pytest.mark.parametrize("packed", [True, False])
def test_a_pass_has_the_rows_own_tokens_and_positions(packed: bool) -> None:
    rows = rows_of(LENGTHS)
    step = collate(rows)
    (inputs,) = passes_of(step, Capacity(packed, 100, 1000), pad_token_id=0)
    if packed:
        filler = ALIGN - sum(LENGTHS) % ALIGN  # a row of padding behind the others
        assert inputs["packed_seq_lengths"].tolist() == [*LENGTHS, filler]
        assert inputs["position_ids"][0].tolist() == [i for n in [*LENGTHS, filler] for i in range(n)]
        assert inputs["input_ids"][0].tolist() == [i for row in rows for i in row["input_ids"]] + [0] * filler
        assert inputs["labels"][0].tolist() == [i for row in rows for i in row["labels"]] + [IGNORE] * filler
    else:
        for i, row in enumerate(rows):
            n = LENGTHS[i]
            assert inputs["input_ids"][i, :n].tolist() == row["input_ids"]
            assert inputs["labels"][i].tolist() == row["labels"] + [IGNORE] * (30 - n)
            assert inputs["attention_mask"][i].tolist() == [1] * n + [0] * (30 - n)


def test_rows_of_one_length_need_neither_padding_nor_packing() -> None:
    inputs = inputs_of(collate(rows_of([4, 7, 7, 7])), range(1, 4), packed=True, pad_token_id=0)
    assert inputs.keys() == {"input_ids", "labels"}
    assert inputs["input_ids"].shape == (3, 7)


# Training


def trained(base: Path, file: Path, folder: Path, ask_at: Any = None, **training: Any) -> Run:
    change = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "train_on_responses_only": True}
    spec = ift_spec(base, training={**change, "max_steps": 5, "eval_steps": 5, **training})
    return run_recipe(spec, folder, file=file, ask_at=ask_at)


@pytest.fixture(scope="module")
def padded(tiny_base: Path, talks: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return trained(tiny_base, talks, tmp_path_factory.mktemp("padded"), packing=False)


def test_packed_rows_learn_the_same_step_by_step(padded: Run, tiny_base: Path, talks: Path, tmp_path: Path) -> None:
    packed = trained(tiny_base, talks, tmp_path, packing=True)
    assert packed.progress.records["packing"] == {"asked": True, "used": True}
    assert packed.progress.records["data"]["truncated_rows"] > 0
    assert packed.outcome.result["tokens"] == padded.outcome.result["tokens"]
    assert_same(padded, packed)


def test_packed_text_learns_the_same_step_by_step(tiny_base: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(
        "".join(json.dumps({"title": str(i), "text": "cat sat " * (1 + 7 * (i % 5))}) + "\n" for i in range(60))
    )
    runs = [
        run_recipe(cpt_spec(tiny_base, training={"packing": packing}), tmp_path / str(packing), file=file)
        for packing in (False, True)
    ]
    assert_same(*runs)


def test_auto_pads_on_a_cpu_and_says_why(tiny_base: Path, talks: Path, tmp_path: Path) -> None:
    run = trained(tiny_base, talks, tmp_path, max_steps=1)
    assert run.progress.records["packing"] == {
        "asked": "auto",
        "used": False,
        "why": "no kernel for packed rows on a CPU",
    }
    assert run.progress.records["passes"] == {"train": {"rows": 4}, "eval": {"rows": 4}}


def test_a_model_whose_rows_see_one_another_is_not_packed(
    tiny_base: Path, talks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    forward = transformers.LlamaModel.forward

    def forgets_where_rows_begin(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("position_ids", None)
        kwargs.pop("packed_seq_lengths", None)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(transformers.LlamaModel, "forward", forgets_where_rows_begin)
    with pytest.raises(JobFailure, match="see one another") as caught:
        trained(tiny_base, talks, tmp_path, packing=True)
    assert caught.value.code == "unsupported"


# Memory. torch.OutOfMemoryError is a GPU's: here it is raised in its place.


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A device that holds passes of at most 70 tokens, padding included. Returns the sizes of those tried."""
    from worker.trainer import Trainer

    tried: list[int] = []
    compute_loss = Trainer.compute_loss

    def limited(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        tried.append(inputs["input_ids"].numel())
        if tried[-1] > 70:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate for {tried[-1]} tokens")
        return compute_loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(Trainer, "compute_loss", limited)
    return tried


@pytest.mark.parametrize("packing", [True, False])
def test_out_of_memory_makes_passes_smaller_and_changes_nothing_else(
    packing: bool, padded: Run, tiny_base: Path, talks: Path, tmp_path: Path, small_memory: list[int]
) -> None:
    run = trained(tiny_base, talks, tmp_path, packing=packing)
    assert max(small_memory) > 70
    assert_same(padded, run)
    said = [m for m in run.progress.logged if "out of memory" in m]
    assert any("training" in m for m in said)
    assert any("evaluation" in m for m in said)
    assert "CUDA out of memory" in said[0]
    passes = run.progress.records["passes"]
    assert passes["train"] == ({"tokens": passes["train"].get("tokens")} if packing else {"rows": 1})


def test_a_resumed_run_begins_with_what_was_found_to_fit(
    tiny_base: Path, talks: Path, tmp_path: Path, small_memory: list[int]
) -> None:
    trained(tiny_base, talks, tmp_path, packing=False, ask_at=(2, "pause"))
    small_memory.clear()
    resumed = trained(tiny_base, talks, tmp_path, packing=False)
    assert resumed.outcome.ended == "done"
    assert max(small_memory) <= 70


def test_a_row_that_does_not_fit_alone_is_an_error(
    tiny_base: Path, talks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from worker.trainer import Trainer

    def never(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Trainer, "compute_loss", never)
    with pytest.raises(torch.OutOfMemoryError):
        trained(tiny_base, talks, tmp_path)


def test_the_default_is_auto() -> None:
    spec = parse_spec(cpt_spec(Path("/x")))
    assert spec.training.packing == "auto"
