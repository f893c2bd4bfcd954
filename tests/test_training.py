"""The recipes train what they claim: real Unsloth, a real tiny Llama, rows on disk."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from service.errors import JobFailure
from tests.recipes import TRAINING, Run, chats, cpt_spec, ift_spec, run_recipe, texts
from worker.adapter_io import scaling
from worker.checkpointing import of_checkpoints
from worker.verify_math import next_token_logprobs


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return texts(tmp_path_factory.mktemp("rows") / "cpt.jsonl")


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chats(tmp_path_factory.mktemp("rows") / "ift.jsonl")


@pytest.fixture(scope="module")
def trained(tiny_base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One cpt run with trained embeddings that several tests look at."""
    return run_recipe(cpt_spec(tiny_base), tmp_path_factory.mktemp("cpt"), file=rows)


def embeddings(folder: Path) -> dict[str, torch.Tensor]:
    state = load_file(folder / "adapter_model.safetensors")
    return {k.removeprefix("base_model.model."): v for k, v in state.items() if "lora_" not in k}


def logits(base: Path, adapter: Path | None, ids: list[int]) -> torch.Tensor:
    """[len(ids), vocabulary] from plain transformers and PEFT, float32."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([ids])).logits[0]


IDS = list(range(10, 40))


def test_embed_tokens_and_lm_head_train_at_their_own_rate(trained: Run, tiny_base: Path) -> None:
    groups = {tuple(g["modules"]): g for g in trained.progress.records["optimizer"]["groups"]}
    full = groups.pop(("embed_tokens", "lm_head"))
    assert full["learning_rate"] == TRAINING["embedding_learning_rate"]
    assert full["tensors"] == 2
    assert full["dtype"] == "float32"
    (lora,) = groups.values()
    assert lora["learning_rate"] == TRAINING["learning_rate"]
    assert set(lora["modules"]) == set(cpt_spec(tiny_base).get("lora", {}).get("target_modules") or lora["modules"])
    assert len(lora["modules"]) == 7
    point = trained.progress.points["train"][3]
    assert point["embedding_learning_rate"] / point["learning_rate"] == pytest.approx(0.1)


@pytest.mark.parametrize("tie", [False, True])
def test_both_embedding_matrices_change_also_for_a_tied_base(
    tie: bool, tiny_base: Path, tiny_base_tied: Path, rows: Path, tmp_path: Path
) -> None:
    base = tiny_base_tied if tie else tiny_base
    run = run_recipe(cpt_spec(base, training={"max_steps": 2}), tmp_path, file=rows)
    before = load_file(base / "model.safetensors")
    after = embeddings(run.adapter)
    assert set(after) == {"model.embed_tokens.weight", "lm_head.weight"}
    start = before["model.embed_tokens.weight"]
    assert not torch.equal(after["model.embed_tokens.weight"], start)
    assert not torch.equal(after["lm_head.weight"], start if tie else before["lm_head.weight"])
    if tie:  # trained apart: two matrices from one
        assert not torch.equal(after["model.embed_tokens.weight"], after["lm_head.weight"])


def test_without_train_embeddings_only_lora_is_trained(tiny_base: Path, rows: Path, tmp_path: Path) -> None:
    run = run_recipe(
        cpt_spec(tiny_base, lora={"train_embeddings": False}, training={"max_steps": 1}), tmp_path, file=rows
    )
    assert embeddings(run.adapter) == {}
    assert [g["modules"] for g in run.progress.records["optimizer"]["groups"]] == [
        sorted(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    ]


def test_the_same_spec_and_seed_give_the_same_losses_and_weights(
    trained: Run, tiny_base: Path, rows: Path, tmp_path: Path
) -> None:
    again = run_recipe(cpt_spec(tiny_base), tmp_path, file=rows)
    assert again.progress.losses == trained.progress.losses
    assert again.progress.eval_losses == trained.progress.eval_losses
    assert again.outcome.result["data_fingerprint"] == trained.outcome.result["data_fingerprint"]
    first, second = (load_file(r.adapter / "adapter_model.safetensors") for r in (trained, again))
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_accumulating_eight_times_one_row_equals_one_batch_of_eight(tiny_base: Path, tmp_path: Path) -> None:
    # Rows of very different lengths: a mean of means instead of a mean over tokens would show.
    uneven = tmp_path / "uneven.jsonl"
    uneven.write_text(
        "".join(
            json.dumps({"title": str(i), "text": "cat sat on a mat " * (1 + 3 * (i % 4))}) + "\n" for i in range(48)
        )
    )
    shapes = {"8x1": (8, 1), "1x8": (1, 8)}
    losses = {}
    for name, (batch, accumulation) in shapes.items():
        change = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "max_steps": 5}
        run = run_recipe(cpt_spec(tiny_base, training=change), tmp_path / name, file=uneven)
        losses[name] = run.progress.losses
    assert losses["1x8"].keys() == losses["8x1"].keys() == {1, 2, 3, 4, 5}
    for step, loss in losses["8x1"].items():
        assert losses["1x8"][step] == pytest.approx(loss, abs=1e-3)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_paused_run_goes_on_as_if_nothing_happened(
    dropout: float, tiny_base: Path, rows: Path, tmp_path: Path
) -> None:
    # Neither logging nor saving falls on the pause; dropout draws from the restored random state.
    spec = cpt_spec(
        tiny_base,
        lora={"lora_dropout": dropout},
        training={"max_steps": 10, "logging_steps": 3, "eval_steps": 5, "save_steps": 100},
    )
    whole = run_recipe(spec, tmp_path / "whole", file=rows)
    paused = run_recipe(spec, tmp_path / "parts", file=rows, ask_at=(4, "pause"))
    assert paused.outcome.ended == "pause"
    assert list(paused.progress.present) == [4]
    resumed = run_recipe(spec, tmp_path / "parts", file=rows)
    assert resumed.progress.resumed_from == 4
    assert paused.progress.losses | resumed.progress.losses == whole.progress.losses
    assert resumed.progress.eval_losses == {s: v for s, v in whole.progress.eval_losses.items() if s > 4}
    assert resumed.outcome.result["tokens"] == whole.outcome.result["tokens"]
    a, b = (load_file(r.adapter / "adapter_model.safetensors") for r in (whole, resumed))
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("early", [False, True], ids=["all-steps", "stopped-early"])
def test_a_run_that_dies_after_its_last_step_takes_no_further_one(
    tiny_base: Path, rows: Path, tmp_path: Path, early: bool
) -> None:
    change: dict[str, Any] = {"max_steps": 4, "save_steps": 2}
    if early:
        change = {
            "max_steps": 40, "eval_steps": 1, "save_steps": 1, "early_stopping_patience": 2, "learning_rate": 0.3,
            "embedding_learning_rate": 0.05, "lr_scheduler_type": "constant", "warmup_ratio": 0.0,
        }  # fmt: skip
    spec = cpt_spec(tiny_base, training=change)
    first = run_recipe(spec, tmp_path, file=rows)
    weights = load_file(first.adapter / "adapter_model.safetensors")
    again = run_recipe(spec, tmp_path, file=rows)  # as the next attempt does: the checkpoints are there
    assert again.progress.resumed_from == first.outcome.result["steps_trained"]
    assert again.progress.losses == {}
    assert again.outcome.result == first.outcome.result
    same = load_file(again.adapter / "adapter_model.safetensors")
    assert all(torch.equal(weights[k], same[k]) for k in weights)


def test_a_cancelled_run_leaves_a_whole_checkpoint_and_no_adapter(tiny_base: Path, rows: Path, tmp_path: Path) -> None:
    run = run_recipe(cpt_spec(tiny_base), tmp_path, file=rows, ask_at=(2, "cancel"))
    assert run.outcome.ended == "cancel"
    assert {p.name for p in run.checkpoints.iterdir()} == {"checkpoint-2"}
    assert not run.adapter.exists()
    names = {p.name for p in (run.checkpoints / "checkpoint-2").iterdir()}
    assert {
        "adapter_model.safetensors",
        "lorry_template.json",
        "optimizer.pt",
        "trainer_state.json",
        "tokenizer.json",
    } <= names


def test_a_checkpoint_is_an_adapter_with_its_losses(trained: Run, tiny_base: Path) -> None:
    assert list(trained.progress.present) == [3, 6]
    for step, values in trained.progress.present.items():
        assert values["eval_loss"] == trained.progress.eval_losses[step]
        assert values["loss"] == trained.progress.losses[step]
    assert not torch.equal(
        logits(tiny_base, Path(trained.progress.present[3]["path"]), IDS), logits(tiny_base, trained.adapter, IDS)
    )


def test_a_checkpoint_says_whether_activations_were_kept(trained: Run, tmp_path: Path) -> None:
    assert of_checkpoints(trained.checkpoints) is trained.progress.records["gradient_checkpointing"]["used"]
    assert of_checkpoints(tmp_path) is None


def test_save_total_limit_keeps_the_newest(tiny_base: Path, rows: Path, tmp_path: Path) -> None:
    spec = cpt_spec(tiny_base, training={"max_steps": 5, "save_steps": 1, "eval_steps": 1, "save_total_limit": 2})
    run = run_recipe(spec, tmp_path, file=rows)
    assert list(run.progress.present) == [4, 5]
    assert {p.name for p in run.checkpoints.iterdir()} == {"checkpoint-4", "checkpoint-5"}


def test_early_stopping_keeps_the_best_checkpoint_as_the_adapter(tiny_base: Path, rows: Path, tmp_path: Path) -> None:
    # A learning rate that first helps and then destroys.
    change = {
        "max_steps": 40,
        "eval_steps": 1,
        "save_steps": 1,
        "save_total_limit": 1,
        "early_stopping_patience": 2,
        "learning_rate": 0.3,
        "embedding_learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0.0,
    }
    run = run_recipe(cpt_spec(tiny_base, training=change), tmp_path, file=rows)
    result, evals = run.outcome.result, run.progress.eval_losses
    best = min((s for s in evals if s > 0), key=evals.__getitem__)
    assert result["stopped_early"]
    assert result["steps_trained"] == best + 2 < 40
    assert result["step"] == result["best_step"] == best
    assert result["eval_loss"] == evals[best]
    kept, adapter = (
        load_file(p / "adapter_model.safetensors") for p in (run.checkpoints / f"checkpoint-{best}", run.adapter)
    )
    assert all(torch.equal(kept[k], adapter[k]) for k in kept)


def test_early_stopping_counts_on_after_a_pause(tiny_base: Path, rows: Path, tmp_path: Path) -> None:
    # Two bad evaluations in a row, one before the pause and one after it.
    change = {
        "max_steps": 40, "eval_steps": 1, "save_steps": 1, "early_stopping_patience": 3, "learning_rate": 0.3,
        "embedding_learning_rate": 0.05, "lr_scheduler_type": "constant", "warmup_ratio": 0.0,
    }  # fmt: skip
    spec = cpt_spec(tiny_base, training=change)
    whole = run_recipe(spec, tmp_path / "whole", file=rows)
    stopped = whole.outcome.result["steps_trained"]
    paused = run_recipe(spec, tmp_path / "parts", file=rows, ask_at=(stopped - 1, "pause"))
    assert paused.outcome.ended == "pause"
    resumed = run_recipe(spec, tmp_path / "parts", file=rows)
    assert resumed.outcome.result["steps_trained"] == stopped
    assert resumed.outcome.result["best_step"] == whole.outcome.result["best_step"]
    assert resumed.outcome.result["eval_loss"] == whole.outcome.result["eval_loss"]


def test_rslora_divides_by_the_root_of_the_rank(trained: Run, tiny_base: Path, rows: Path, tmp_path: Path) -> None:
    config = json.loads((trained.adapter / "adapter_config.json").read_text())
    assert config["use_rslora"]
    assert scaling(config) == pytest.approx(16 / math.sqrt(8))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), trained.adapter)
    assert model.base_model.model.model.layers[0].mlp.up_proj.scaling["default"] == pytest.approx(16 / math.sqrt(8))
    plain = run_recipe(cpt_spec(tiny_base, lora={"use_rslora": False}, training={"max_steps": 1}), tmp_path, file=rows)
    assert scaling(json.loads((plain.adapter / "adapter_config.json").read_text())) == 2


def test_the_learning_rate_follows_warm_up_and_schedule(tiny_base: Path, rows: Path, tmp_path: Path) -> None:
    change = {"max_steps": 10, "warmup_ratio": 0.2, "lr_scheduler_type": "cosine", "learning_rate": 1e-3}
    run = run_recipe(cpt_spec(tiny_base, training=change), tmp_path, file=rows)
    rates = {step: point["learning_rate"] for step, point in run.progress.points["train"].items()}
    assert rates[1] == 0
    assert rates[2] == pytest.approx(5e-4)
    for step in range(3, 11):
        assert rates[step] == pytest.approx(1e-3 * (1 + math.cos(math.pi * (step - 3) / 8)) / 2)


def test_the_record_says_what_ran(trained: Run) -> None:
    record = trained.progress.records
    assert record["trainable_parameters"] < record["total_parameters"]
    assert record["optimizer"]["asked"] == "adamw_8bit"
    assert record["optimizer"]["used"] == "adamw_torch_fused"  # no GPU here, and it says so
    assert record["data"]["fingerprint"] == trained.outcome.result["data_fingerprint"]
    assert {"torch", "unsloth", "transformers", "trl", "peft", "python"} <= set(record["versions"])
    assert record["device"]["type"] == "cpu"
    assert record["compute"] == {"dtype": "float32", "load_in_4bit": False, "autocast": None}
    assert trained.outcome.result["verification"]["mean_kl"] < 1e-6


def test_metrics_go_to_tensorboard_files(trained: Run) -> None:
    files = list((trained.paths.run_dir / "tensorboard").rglob("events.out.tfevents.*"))
    assert files
    assert b"train/loss" in b"".join(f.read_bytes() for f in files)
    assert b"eval/loss" in b"".join(f.read_bytes() for f in files)


def test_a_four_bit_base_trains_and_loftq_narrows_its_rounding_error(
    tiny_base: Path, rows: Path, tmp_path: Path
) -> None:
    import bitsandbytes as bnb

    from service.specs import parse_spec
    from worker import model as models

    spec = cpt_spec(
        tiny_base, model={"load_in_4bit": True}, lora={"loftq_config": {"loftq_bits": 4}}, training={"max_steps": 2}
    )
    run = run_recipe(spec, tmp_path, file=rows)
    assert run.progress.records["compute"]["load_in_4bit"] is True
    assert run.outcome.ended == "done"

    parsed: Any = parse_spec(spec)
    base = models.load_base(parsed.model, str(tiny_base), checkpointing=False, token=None, trust_remote_code=False)
    model = models.add_lora(base, parsed.lora, seed=0, checkpointing=False)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    exact = load_file(tiny_base / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    rounded = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    fit = (layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach()
    plain, corrected = (exact - rounded).norm(), (exact - rounded - fit).norm()
    best = torch.linalg.svdvals(exact - rounded)[8:].norm()  # Eckart-Young: no rank-8 matrix does better
    assert corrected < plain
    assert corrected == pytest.approx(best.item(), rel=0.02)


def test_continue_starts_where_the_parent_ended_and_trains_its_matrices(
    trained: Run, tiny_base: Path, talks: Path, tmp_path: Path
) -> None:
    change = {"init": {"adapter": "a", "mode": "continue"}}
    run = run_recipe(
        ift_spec(
            tiny_base, **change, training={"max_steps": 1, "learning_rate": 1e-9, "embedding_learning_rate": 1e-9}
        ),
        tmp_path / "still",
        file=talks,
        parent=trained.adapter,
    )
    torch.testing.assert_close(
        logits(tiny_base, run.adapter, IDS), logits(tiny_base, trained.adapter, IDS), atol=1e-5, rtol=0
    )
    moved = run_recipe(ift_spec(tiny_base, **change), tmp_path / "moved", file=talks, parent=trained.adapter)
    assert moved.outcome.result["eval_loss"] < moved.outcome.result["eval_loss_start"]
    assert json.loads((moved.adapter / "adapter_config.json").read_text())["r"] == 8


@pytest.mark.parametrize("mode", ["stack", "merge"])
@pytest.mark.parametrize("embed", [False, True])
def test_stack_and_merge_give_the_parent_plus_what_was_learnt(
    mode: str, embed: bool, trained: Run, tiny_base: Path, talks: Path, tmp_path: Path
) -> None:
    change = {
        "init": {"adapter": "a", "mode": mode},
        "lora": {"r": 4, "lora_alpha": 4, "train_embeddings": embed, "target_modules": ["q_proj", "up_proj"]},
    }
    still = run_recipe(
        ift_spec(
            tiny_base, **change, training={"max_steps": 1, "learning_rate": 1e-9, "embedding_learning_rate": 1e-9}
        ),
        tmp_path / "still",
        file=talks,
        parent=trained.adapter,
    )
    parent = logits(tiny_base, trained.adapter, IDS)
    torch.testing.assert_close(logits(tiny_base, still.adapter, IDS), parent, atol=1e-4, rtol=0)
    assert still.outcome.result["verification"]["mean_kl"] < 1e-6

    run = run_recipe(ift_spec(tiny_base, **change), tmp_path / "moved", file=talks, parent=trained.adapter)
    config = json.loads((run.adapter / "adapter_config.json").read_text())
    assert config["r"] == 12
    assert (logits(tiny_base, run.adapter, IDS) - parent).abs().max() > 1e-3
    # The parent's own update is in it, unchanged: B·A·scaling of the sum = the parent's + the new one's.
    total, first = (load_file(p / "adapter_model.safetensors") for p in (run.adapter, trained.adapter))
    new = load_file(run.checkpoints / "checkpoint-6" / "trainable" / "adapter_model.safetensors")
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_{}.weight"

    def update(state: dict[str, torch.Tensor]) -> torch.Tensor:
        return state[key.format("B")] @ state[key.format("A")]

    expected = update(first) * (16 / math.sqrt(8)) + update(new) * (4 / math.sqrt(4))
    torch.testing.assert_close(update(total), expected, atol=1e-5, rtol=1e-4)
    trained_embeddings = embeddings(trained.adapter)["lm_head.weight"]
    assert torch.equal(embeddings(run.adapter)["lm_head.weight"], trained_embeddings) is (not embed)


def test_a_stacked_run_resumes_like_any_other(trained: Run, tiny_base: Path, talks: Path, tmp_path: Path) -> None:
    spec = ift_spec(tiny_base, init={"adapter": "a", "mode": "stack"}, lora={"r": 4, "train_embeddings": False})
    whole = run_recipe(spec, tmp_path / "whole", file=talks, parent=trained.adapter)
    run_recipe(spec, tmp_path / "parts", file=talks, parent=trained.adapter, ask_at=(2, "pause"))
    resumed = run_recipe(spec, tmp_path / "parts", file=talks, parent=trained.adapter)
    assert resumed.progress.losses == {s: v for s, v in whole.progress.losses.items() if s > 2}


def test_a_parent_s_weights_survive_a_trainer_that_casts_them(
    trained: Run, tiny_base: Path, talks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL's casts what is trained of a 4-bit model to bfloat16."""
    from unsloth import UnslothTrainer

    init = UnslothTrainer.__init__

    def casts(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)

    monkeypatch.setattr(UnslothTrainer, "__init__", casts)
    spec = ift_spec(
        tiny_base,
        init={"adapter": "a", "mode": "continue"},
        training={"max_steps": 1, "learning_rate": 1e-12, "embedding_learning_rate": 1e-12},
    )
    run = run_recipe(spec, tmp_path, file=talks, parent=trained.adapter)
    parent, child = (load_file(f / "adapter_model.safetensors") for f in (trained.adapter, run.adapter))
    for name, weight in parent.items():
        assert torch.allclose(child[name], weight, atol=1e-9, rtol=1e-6), name


def test_continue_refuses_another_rank(trained: Run, tiny_base: Path, talks: Path, tmp_path: Path) -> None:
    spec = ift_spec(tiny_base, init={"adapter": "a", "mode": "continue"}, lora={"r": 16})
    with pytest.raises(JobFailure, match=r"lora\.r: .* must be 8, not 16") as caught:
        run_recipe(spec, tmp_path, file=talks, parent=trained.adapter)
    assert caught.value.code == "invalid_spec"


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({"lora": {"target_modules": ["q_proj", "nonsense"]}}, "invalid_spec", "no module named nonsense"),
        ({"dataset": {"template": {"prompt": "{missing}"}}}, "invalid_data", "missing"),
    ],
)
def test_a_spec_that_cannot_be_met_fails_with_its_reason(
    change: dict[str, Any], code: str, message: str, tiny_base: Path, rows: Path, tmp_path: Path
) -> None:
    with pytest.raises(JobFailure, match=message) as caught:
        run_recipe(cpt_spec(tiny_base, **change), tmp_path, file=rows)
    assert caught.value.code == code
    assert not (tmp_path / "out").exists()


def test_bad_data_fails_before_the_model_is_loaded(tiny_base: Path, tmp_path: Path) -> None:
    import shutil

    weightless = tmp_path / "weightless"
    shutil.copytree(tiny_base, weightless)
    (weightless / "model.safetensors").unlink()  # whoever loads it fails with another error
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"title": "a", "text": "b"}\n{"title": "a", "text": 5\n')
    with pytest.raises(JobFailure) as caught:
        run_recipe(cpt_spec(weightless), tmp_path / "x", file=bad)
    assert caught.value.code == "invalid_data"
    assert caught.value.rows[0]["row"] == 2


def test_an_adapter_that_reads_back_differently_is_caught(
    tiny_base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import worker.fit
    from worker.files import whole_folder

    class Breaking:
        """whole_folder, then the weights on disk are not those that were trained."""

        def __init__(self, target: Path) -> None:
            self.inner, self.target = whole_folder(target), target

        def __enter__(self) -> Path:
            return self.inner.__enter__()

        def __exit__(self, *error: Any) -> Any:
            self.inner.__exit__(*error)
            from safetensors.torch import save_file

            path = self.target / "adapter_model.safetensors"
            state = {k: torch.randn_like(v) if "lora_B" in k else v for k, v in load_file(path).items()}
            save_file(state, path)

    monkeypatch.setattr(worker.fit, "whole_folder", Breaking)
    with pytest.raises(JobFailure, match="mean KL") as caught:
        run_recipe(cpt_spec(tiny_base, training={"max_steps": 1}), tmp_path, file=rows)
    assert caught.value.code == "verification_failed"


def test_the_trained_model_answers_with_its_frozen_embeddings_off_the_device(trained: Run, tiny_base: Path) -> None:
    # On a GPU they wait on the host while it trains, and are the first of its parameters. Here: on no device at all.
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, trained.adapter, is_trainable=True)
    ids = list(range(5, 25))
    before = next_token_logprobs(model, ids)
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.original_module.to("meta")
    assert next(model.parameters()).device.type == "meta"
    assert torch.equal(next_token_logprobs(model, ids), before)
