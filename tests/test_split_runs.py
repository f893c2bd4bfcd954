"""Runs with split embeddings on a CPU. What a GPU brings is put in: bfloat16 autocast and bitsandbytes' AdamW."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.recipes import Run, cpt_spec, run_recipe, texts
from worker import split_weights


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unsloth's CPU fallback has neither; the rest of the run is the real one."""
    import bitsandbytes as bnb

    from worker import fit, trainer, verify

    def create_optimizer(self: Any, model: Any = None) -> Any:
        if self.optimizer is None:
            own: dict[bool, list[Any]] = {True: [], False: []}
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    own[".lora_" in name].append(parameter)
            rates = {True: self.args.learning_rate, False: self.args.embedding_learning_rate}
            groups = [{"params": own[lora], "lr": rates[lora]} for lora in own]
            self.optimizer = bnb.optim.AdamW(groups, weight_decay=0.0, optim_bits=8)
        return self.optimizer

    def under_autocast(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            with torch.autocast("cpu", torch.bfloat16):
                return function(*args, **kwargs)

        return call

    ours = trainer.LorryTrainer
    monkeypatch.setattr(ours.__mro__[1], "create_optimizer", create_optimizer)
    monkeypatch.setattr(ours, "compute_loss", under_autocast(ours.compute_loss))
    for module in (fit, verify):
        monkeypatch.setattr(module, "next_token_logprobs", under_autocast(module.next_token_logprobs))
    monkeypatch.setattr(verify, "LIMIT_FLOAT32", verify.LIMIT_LOW)
    monkeypatch.setattr(split_weights, "wanted", lambda spec, args: spec.lora.train_embeddings)


def spec_of(base: Path, **training: Any) -> dict[str, Any]:
    return cpt_spec(
        base,
        training={"max_steps": 8, "save_steps": 100, "embedding_learning_rate": 1e-5, "weight_decay": 0, **training},
    )


def saved(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.adapter / "adapter_model.safetensors")


def test_a_run_learns_what_it_would_in_float32_and_saves_float32(
    tiny_base: Path, tmp_path: Path, as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = texts(tmp_path / "cpt.jsonl")
    run = run_recipe(spec_of(tiny_base), tmp_path / "split", file=rows)
    groups = {tuple(g["modules"]): g["dtype"] for g in run.progress.records["optimizer"]["groups"]}
    assert groups["embed_tokens", "lm_head"] == split_weights.DTYPE
    monkeypatch.setattr(split_weights, "wanted", lambda spec, args: False)
    plain = run_recipe(spec_of(tiny_base), tmp_path / "float32", file=rows)
    assert "float32" in {g["dtype"] for g in plain.progress.records["optimizer"]["groups"]}
    for step, loss in plain.progress.losses.items():
        assert run.progress.losses[step] == pytest.approx(loss, abs=1e-2)
    before = load_file(tiny_base / "model.safetensors")
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        weight, start = saved(run)[f"base_model.model.{key}"], before[key].float()
        assert weight.dtype == torch.float32
        moved = (weight - start).abs()
        assert 0 < moved.max() < 2e-4
        # They moved by less than bfloat16 tells apart, and kept it.
        assert ((weight.bfloat16() == start.bfloat16()) & (moved > 0)).float().mean() > 0.05


def test_a_paused_run_goes_on_to_the_same_bits(tiny_base: Path, tmp_path: Path, as_on_a_gpu: None) -> None:
    rows = texts(tmp_path / "cpt.jsonl")
    whole = run_recipe(spec_of(tiny_base), tmp_path / "whole", file=rows)
    run_recipe(spec_of(tiny_base), tmp_path / "parts", file=rows, ask_at=(5, "pause"))
    resumed = run_recipe(spec_of(tiny_base), tmp_path / "parts", file=rows)
    assert resumed.progress.resumed_from == 5
    for key, weight in saved(whole).items():
        assert torch.equal(saved(resumed)[key], weight), key
