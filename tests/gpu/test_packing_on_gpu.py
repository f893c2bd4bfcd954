"""Packed passes on a CUDA device: each row's losses are its own, the curve is the padded one, memory that runs out is borne."""

from __future__ import annotations

import json
import random
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch

from service.specs import ModelSpec
from tests.recipes import Run, cpt_spec, ift_spec, run_recipe

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "then",
    "some",
    "more",
    "words",
    "came",
    "to",
    "be",
    "read",
    "by",
    "many",
    "people",
]


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations of very different lengths, some longer than the window of 256 tokens."""
    rnd = random.Random(3)
    path = tmp_path_factory.mktemp("talks") / "talks.jsonl"
    chats = [
        [
            {"role": "user", "content": " ".join(rnd.choices(WORDS, k=rnd.choice([1, 4, 40])))},
            {"role": "assistant", "content": " ".join(rnd.choices(WORDS, k=rnd.choice([2, 9, 60, 200])))},
        ]
        for _ in range(800)
    ]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return path


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rnd = random.Random(4)
    path = tmp_path_factory.mktemp("pieces") / "pieces.jsonl"
    rows = [{"title": str(i), "text": " ".join(rnd.choices(WORDS, k=rnd.choice([3, 20, 150])))} for i in range(200)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def trained(base: Path, file: Path, folder: Path, kind: str = "ift", four_bit: bool = True, **training: Any) -> Run:
    make = ift_spec if kind == "ift" else cpt_spec
    change = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "learning_rate": 2e-4}
    change |= {"train_on_responses_only": True} if kind == "ift" else {}
    spec = make(
        base,
        model={"max_seq_length": 256, "load_in_4bit": four_bit},
        training={**change, "max_steps": 10, "eval_steps": 5, **training},
    )
    return run_recipe(spec, folder, file=file)


def gaps(one: Run, other: Run) -> list[float]:
    assert one.progress.losses.keys() == other.progress.losses.keys()
    return [abs(loss - other.progress.losses[step]) for step, loss in one.progress.losses.items()] + [
        abs(loss - other.progress.eval_losses[step]) for step, loss in one.progress.eval_losses.items()
    ]


@pytest.mark.parametrize("four_bit", [False, True])
def test_each_row_s_losses_are_its_own(four_bit: bool, base: Path) -> None:
    from worker import model as models
    from worker.packing import choose_packing
    from worker.passes import collate, inputs_of

    asked = ModelSpec(name=str(base), max_seq_length=256, load_in_4bit=four_bit)
    model = models.load_base(asked, str(base), checkpointing=False, token=None, trust_remote_code=False)
    model = models.add_lora(model, cpt_lora(), seed=1, checkpointing=False)
    with torch.no_grad():  # an adapter that does something
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    assert choose_packing(True, model)["used"]
    rnd = random.Random(0)
    lengths = [rnd.choice([3, 17, 100, 256]) for _ in range(24)]
    rows = []
    for n in lengths:
        ids = [rnd.randrange(3, 300) for _ in range(n)]
        rows.append({"input_ids": ids, "labels": ids})
    step = collate(rows)
    step = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in step.items()}

    @torch.no_grad()
    def losses(indices: range) -> torch.Tensor:
        inputs = inputs_of(step, indices, packed=True, pad_token_id=0)
        labels = inputs.pop("labels")[0]
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(**inputs, use_cache=False).logits[0].float()
        return torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="none", ignore_index=-100)

    together = losses(range(len(rows)))
    worst = 0.0
    for i, (start, n) in enumerate(zip([0, *accumulate(lengths)], lengths, strict=False)):
        alone = losses(range(i, i + 1))
        packed = together[start : start + n - 1]
        worst = max(worst, float((alone - packed).abs().max()))
        assert abs(float(alone.mean() - packed.mean())) < 1e-2
    print("largest difference of a token's loss", worst)
    assert worst < 0.1


def cpt_lora() -> Any:
    from service.specs import LoraSpec

    return LoraSpec(r=8, lora_alpha=16)


@pytest.mark.parametrize("kind", ["ift", "cpt"])
@pytest.mark.parametrize("four_bit", [False, True])
def test_packed_rows_follow_the_padded_curve(
    kind: str, four_bit: bool, base: Path, talks: Path, pieces: Path, tmp_path: Path
) -> None:
    file = talks if kind == "ift" else pieces
    padded = trained(base, file, tmp_path / "padded", kind, four_bit, packing=False)
    packed = trained(base, file, tmp_path / "packed", kind, four_bit)
    assert packed.progress.records["packing"] == {"asked": "auto", "used": True}
    assert packed.outcome.result["tokens"] == padded.outcome.result["tokens"]
    print(kind, four_bit, "largest gap of a loss", max(gaps(padded, packed)))
    assert max(gaps(padded, packed)) < 1e-2
    if kind == "ift":
        assert packed.progress.records["data"]["truncated_rows"] > 0


def test_memory_that_runs_out_halves_the_passes_and_the_curve_stays(base: Path, talks: Path, tmp_path: Path) -> None:
    """A limit between what passes of 256 rows take and what those of 8 do."""
    large, small = (
        {"per_device_train_batch_size": 256, "gradient_accumulation_steps": 1},
        {
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 32,
        },
    )
    peaks = []
    for batch in (small, large):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        whole = trained(base, talks, tmp_path / str(len(peaks)), packing=True, max_steps=3, **batch)
        peaks.append(torch.cuda.max_memory_reserved())
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    try:
        torch.cuda.set_per_process_memory_fraction(sum(peaks) / 2 / total)
        limited = trained(base, talks, tmp_path / "limited", packing=True, max_steps=3, **large)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    said = [m for m in limited.progress.logged if "out of memory" in m]
    print(said, limited.progress.records["passes"], whole.progress.records["passes"], peaks)
    assert said
    assert limited.progress.records["passes"]["train"]["tokens"] < whole.progress.records["passes"]["train"]["tokens"]
    assert max(gaps(whole, limited)) < 1e-2
