"""The estimate of a training's memory: against what was measured, and how it grows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from service.specs import CptSpec, IftSpec, parse_spec
from tests.steps import merged
from worker.auto_batch import with_batch
from worker.budget import Budget, budget_of
from worker.checkpointing import choose
from worker.dry_run import largest_pass
from worker.memory import GIB, MARGIN, Estimate, NoEstimate, Shape, estimate, largest_batch, plan

LLAMA_1B = Shape.of(
    {
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256, "tie_word_embeddings": True,
    }
)  # fmt: skip
LLAMA_8B_CONFIG = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_8B = Shape.of(LLAMA_8B_CONFIG)
PASS = 8 * 2048  # tokens of the default pass


def spec(**changes: Any) -> CptSpec | IftSpec:
    """The default recipe; keyword arguments set dotted paths, with __ for the dot."""
    base = {"kind": "cpt", "adapter": "a", "dataset": {"path": "org/set", "template": {"prompt": "{text}"}}}
    parsed = parse_spec(merged(base, {k.replace("__", "."): v for k, v in changes.items()}))
    assert parsed.kind != "export"
    return parsed


# Measured on one H100 80 GB, torch.cuda.max_memory_allocated(): Unsloth's own script of the default recipe (NF4 base,
# r = 64, adamw_8bit, 8 × 2048 tokens, 2 passes a step). It trains the embeddings in the base's bfloat16, and a tied pair
# as one matrix; lorry trains two.
@pytest.mark.parametrize(("shape", "gib"), [(LLAMA_1B, 6.4), (LLAMA_8B, 18.8)])
def test_the_estimate_is_near_what_was_measured_on_an_h100(shape: Shape, gib: float) -> None:
    found = estimate(spec(), shape, PASS, embedding_bytes=2, keeps_tied=True)
    assert found.bytes / GIB == pytest.approx(gib, rel=0.15)


# Jobs of lorry's with gradient checkpointing, measured on an H100 80 GB or an H200 (docs/benchmarks.md).
@pytest.mark.parametrize(
    ("shape", "tokens", "optim", "gib"),
    [
        (LLAMA_1B, PASS, "adamw_8bit", 7.63),
        (LLAMA_8B, PASS, "adamw_8bit", 18.01),
        (LLAMA_8B, 2 * 2048, "adamw_8bit", 16.06),
        (LLAMA_8B, 2 * 2048, "paged_adamw_8bit", 10.87),
    ],
)
def test_the_estimate_of_embeddings_as_halves_is_near_what_jobs_took(
    shape: Shape, tokens: int, optim: str, gib: float
) -> None:
    assert estimate(spec(training__optim=optim), shape, tokens).bytes / GIB == pytest.approx(gib, rel=0.05)


@pytest.mark.parametrize("shape", [LLAMA_1B, LLAMA_8B])
@pytest.mark.parametrize(
    "changes",
    [{}, {"lora__train_embeddings": False}, {"model__load_in_4bit": False}, {"training__optim": "paged_adamw_8bit"}],
)
def test_the_parts_add_up_to_the_largest_phase(shape: Shape, changes: dict[str, Any]) -> None:
    for tokens in (1, 100, PASS, 10 * PASS):
        found = estimate(spec(**changes), shape, tokens)
        assert sum(found.parts.values()) == found.bytes == max(found.phases.values()) == found.phases[found.phase]
        assert min(found.parts.values()) >= 0


def test_more_tokens_a_pass_never_take_less() -> None:
    for shape in (LLAMA_1B, LLAMA_8B):
        for device in ("cuda", "cpu"):
            sizes = [estimate(spec(), shape, n * 512, device=device).bytes for n in range(1, 200)]  # type: ignore[arg-type]
            assert sizes == sorted(sizes)


def total(**changes: Any) -> int:
    return estimate(spec(**changes), LLAMA_8B, PASS).bytes


def test_what_saves_memory_takes_less_and_what_costs_some_takes_more() -> None:
    usual = total()
    assert total(lora__train_embeddings=False) < usual - 6 * GIB
    assert total(model__load_in_4bit=False) > usual + 8 * GIB
    assert total(lora__r=128) > usual
    assert total(lora__target_modules=["q_proj"]) < usual
    assert total(training__optim="adamw_torch") > usual > total(training__optim="paged_adamw_8bit")
    parent = estimate(spec(), LLAMA_8B, PASS, frozen_adapter_bytes=GIB).bytes
    assert parent == usual + GIB


def test_a_gpu_holds_16_bits_of_trained_embeddings_where_a_run_is_checkpointed() -> None:
    for optim, checkpointing, held in (
        ("adamw_8bit", True, 2), ("paged_adamw_8bit", True, 2), ("adamw_torch", True, 4), ("adamw_8bit", False, 4),
    ):  # fmt: skip
        found = estimate(spec(training__optim=optim), LLAMA_8B, PASS, checkpointing=checkpointing)
        assert found.parts["embeddings"] == held * 2 * LLAMA_8B.matrix, (optim, checkpointing)
    on_cpu = estimate(spec(), LLAMA_8B, PASS, device="cpu")
    assert on_cpu.parts["embeddings"] == 4 * 2 * LLAMA_8B.matrix


def test_embed_tokens_keeps_32_bit_states_under_an_8_bit_optimizer() -> None:
    states = estimate(spec(), LLAMA_8B, PASS).parts["optimizer"]
    lora = LLAMA_8B.lora(spec().lora.target_modules, 64)
    eight_bit = 2 + 2 * 4 / 256
    assert states == pytest.approx(LLAMA_8B.matrix * (8 + eight_bit) + lora * eight_bit)


def test_weights_are_counted_as_the_models_have_them() -> None:
    assert LLAMA_8B.parameters == 8_030_261_248  # Llama 3.1 8B's model card
    assert LLAMA_1B.parameters == 1_235_814_400  # Llama 3.2 1B's
    qwen = Shape.of(
        {
            "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
            "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151_936, "tie_word_embeddings": True,
        }
    )  # fmt: skip
    assert qwen.parameters == 494_032_768  # Qwen2.5 0.5B's


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "mistral", "gemma"])
@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_those_of_transformers_own_models(kind: str, tied: bool) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128, "head_dim": 24}
    config = AutoConfig.for_model(
        kind, **sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied, pad_token_id=0
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = Shape.of(config)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    layer = {
        n.rsplit(".", 1)[-1]: m for n, m in model.named_modules() if type(m) is torch.nn.Linear and "layers.0" in n
    }
    assert shape.projections == {n: (m.in_features, m.out_features) for n, m in layer.items()}


def test_a_model_that_the_arithmetic_does_not_know_has_no_estimate() -> None:
    with pytest.raises(NoEstimate, match="mixtral"):
        Shape.of({"model_type": "mixtral"})
    with pytest.raises(NoEstimate, match="router"):
        estimate(spec(lora__target_modules=["q_proj", "router"]), LLAMA_1B, 100)


@pytest.mark.parametrize(
    ("changes", "longest", "tokens"),
    [
        ({}, 2048, PASS),
        ({}, 300, 16 * 300),  # packed: all rows of a step
        ({}, 1500, PASS),  # packed: what 8 full windows have
        ({"training__packing": False}, 300, 8 * 300),
    ],
)
def test_the_largest_pass_of_a_dry_run_is_what_its_rows_can_fill(
    changes: dict[str, Any], longest: int, tokens: int
) -> None:
    card = Budget("cuda", "a GPU", 80 * GIB, "this host")
    asked = spec(**changes, training__gradient_checkpointing=True)
    found = largest_pass(asked, LLAMA_8B_CONFIG, LLAMA_8B, longest, card, 0)
    assert found.tokens == tokens
    assert found == estimate(asked, LLAMA_8B, tokens)
    kept = spec(**changes, training__gradient_checkpointing=False)
    card = Budget("cuda", "a GPU", 40 * GIB, "this host")
    found = largest_pass(kept, LLAMA_8B_CONFIG, LLAMA_8B, longest, card, 0)
    assert found.tokens <= tokens
    assert found.fits(card.room) == (found.bytes * (1 + MARGIN) <= card.room)
    assert found.parts["activations"] > estimate(kept, LLAMA_8B, found.tokens).parts["activations"]


def test_a_budget_is_no_more_than_the_fraction_that_jobs_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100, 80GB, 60000, 80000'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr("worker.budget.sees_gpu", lambda: True)
    assert budget_of(None, None) == Budget("cuda", "NVIDIA H100, 80GB", 60000 * 2**20, "this host")
    assert budget_of(1, None, 0.5).free_bytes == 40000 * 2**20
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert budget_of(1, None, 0.5).free_bytes is None
    monkeypatch.setattr("worker.budget.sees_gpu", lambda: False)
    assert budget_of(1, {"type": "cuda", "name": "X", "memory_bytes": 80 * GIB}, 0.5).free_bytes == 40 * GIB


# The batch


def test_auto_is_the_largest_power_of_two_that_fits_and_keeps_the_rows_of_a_step() -> None:
    auto = spec(training__per_device_train_batch_size="auto", training__gradient_accumulation_steps=4)
    before: Estimate | None = None
    for gib in (1, 20, 24, 30, 80):
        chosen = plan(auto, LLAMA_8B, gib * GIB, 2048)
        assert chosen.batch * chosen.accumulation == 32
        assert chosen.batch == largest_batch(auto, LLAMA_8B, gib * GIB, 2048)
        assert chosen.fits == (chosen.estimate.bytes * (1 + MARGIN) <= gib * GIB)
        if chosen.fits and chosen.batch < 32:
            assert not estimate(auto, LLAMA_8B, 2 * chosen.batch * 2048).fits(gib * GIB)
        assert before is None or chosen.estimate.bytes >= before.bytes
        before = chosen.estimate
    assert chosen.batch == 32
    assert plan(auto, LLAMA_8B, GIB, 2048).batch == 1
    assert not plan(auto, LLAMA_8B, GIB, 2048).fits


def test_auto_keeps_activations_where_they_fit_as_the_run_then_does() -> None:
    auto = spec(training__per_device_train_batch_size="auto", training__gradient_accumulation_steps=4)
    chosen = plan(auto, LLAMA_8B, 80 * GIB, 2048)
    asked = with_batch(auto, chosen.batch, chosen.accumulation)
    choice = choose(asked, LLAMA_8B_CONFIG, 2048, 80 * GIB, gpu=True)
    assert (choice.used, choice.tokens) == (False, chosen.estimate.tokens)
    assert chosen.estimate == estimate(asked, LLAMA_8B, chosen.estimate.tokens, checkpointing=False)
    beside = choose(asked, LLAMA_8B_CONFIG, 2048, 80 * GIB, gpu=True, frozen_adapter_bytes=8 * GIB)
    assert beside.tokens is not None
    assert beside.tokens < chosen.estimate.tokens


def test_short_rows_fit_in_larger_batches() -> None:
    auto = spec(training__per_device_train_batch_size="auto", training__gradient_accumulation_steps=8)
    assert plan(auto, LLAMA_8B, 32 * GIB, 256).batch > plan(auto, LLAMA_8B, 32 * GIB, 2048).batch
    longest = plan(auto, LLAMA_8B, 32 * GIB, 100_000)  # cut at max_seq_length
    assert longest == plan(auto, LLAMA_8B, 32 * GIB, 2048)


def test_rows_of_a_step_that_no_larger_power_of_two_divides_bound_the_batch() -> None:
    auto = spec(training__per_device_train_batch_size="auto", training__gradient_accumulation_steps=3)
    chosen = plan(auto, LLAMA_1B, 80 * GIB, 128)
    assert (chosen.batch, chosen.accumulation) == (8, 3)


def test_a_batch_that_is_given_stays_and_is_only_estimated() -> None:
    chosen = plan(spec(training__per_device_train_batch_size=3), LLAMA_8B, 80 * GIB, 2048)
    assert (chosen.batch, chosen.accumulation, chosen.estimate.tokens) == (3, 2, 3 * 2048)


def test_on_a_cpu_auto_is_eight_or_what_the_memory_bears() -> None:
    auto = spec(training__per_device_train_batch_size="auto", lora__train_embeddings=False, model__load_in_4bit=False)
    small = Shape.of(
        {
            "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
            "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49_152, "tie_word_embeddings": True,
        }
    )  # fmt: skip
    assert plan(auto, small, 512 * GIB, 256, device="cpu").batch == 8
    assert plan(auto, small, GIB, 256, device="cpu").batch < 8


@pytest.mark.parametrize("value", [0, 4097, "Auto", 1.5, None])
def test_a_batch_is_a_number_or_the_word_auto(value: Any) -> None:
    with pytest.raises(ValidationError):
        spec(training__per_device_train_batch_size=value)
