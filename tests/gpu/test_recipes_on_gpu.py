"""The same recipes on a CUDA device: Unsloth's fused kernels, bfloat16, NF4, adamw_8bit. Run with `pytest -m gpu tests/gpu`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.recipes import Run, chats, cpt_spec, ift_spec, run_recipe
from tests.tiny import make_tiny_base

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chats(tmp_path_factory.mktemp("rows") / "ift.jsonl")


@pytest.fixture(scope="module")
def trained(base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_recipe(cpt_spec(base, training={"max_steps": 12}), tmp_path_factory.mktemp("cpt"), file=rows)


@pytest.mark.parametrize("four_bit", [False, True])
def test_cpt_trains_in_bfloat16_with_8_bit_adamw_and_reads_back(
    four_bit: bool, base: Path, rows: Path, tmp_path: Path
) -> None:
    run = run_recipe(cpt_spec(base, model={"load_in_4bit": four_bit}, training={"max_steps": 12}), tmp_path, file=rows)
    record = run.progress.records
    assert record["device"]["type"] == "cuda"
    assert record["compute"] == {"dtype": "bfloat16", "load_in_4bit": four_bit, "autocast": "bfloat16"}
    assert record["optimizer"]["used"] == "adamw_8bit"
    groups = {tuple(g["modules"]): g for g in record["optimizer"]["groups"]}
    assert groups["embed_tokens", "lm_head"]["learning_rate"] == pytest.approx(1e-4)
    assert groups["embed_tokens", "lm_head"]["dtype"] == "float32"
    assert run.outcome.result["eval_loss"] < run.outcome.result["eval_loss_start"]
    print("KL", run.outcome.result["verification"]["mean_kl"], run.progress.losses)
    state = load_file(run.adapter / "adapter_model.safetensors")
    before = load_file(base / "model.safetensors")
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        assert not torch.equal(state[f"base_model.model.{key}"].float(), before[key].bfloat16().float())


def test_a_paused_run_goes_on_as_if_nothing_happened(base: Path, rows: Path, tmp_path: Path) -> None:
    spec = cpt_spec(base, model={"load_in_4bit": True}, training={"max_steps": 12, "save_steps": 100})
    whole = run_recipe(spec, tmp_path / "whole", file=rows)
    paused = run_recipe(spec, tmp_path / "parts", file=rows, ask_at=(5, "pause"))
    resumed = run_recipe(spec, tmp_path / "parts", file=rows)
    got = paused.progress.losses | resumed.progress.losses
    print({s: (whole.progress.losses[s], got[s]) for s in got})
    assert got.keys() == whole.progress.losses.keys()
    for step, loss in whole.progress.losses.items():
        assert got[step] == pytest.approx(loss, abs=1e-2)


@pytest.mark.parametrize("mode", ["continue", "stack", "merge"])
def test_ift_starts_from_an_adapter_in_each_mode(
    mode: str, trained: Run, base: Path, talks: Path, tmp_path: Path
) -> None:
    lora = {} if mode == "continue" else {"lora": {"r": 4, "train_embeddings": False}}
    spec = ift_spec(
        base, init={"adapter": "a", "mode": mode}, training={"max_steps": 12, "train_on_responses_only": True}, **lora
    )
    spec["model"]["load_in_4bit"] = mode == "stack"
    run = run_recipe(spec, tmp_path, file=talks, parent=trained.adapter)
    result = run.outcome.result
    print(mode, result["eval_loss_start"], result["eval_loss"], result["verification"]["mean_kl"])
    assert result["eval_loss"] < result["eval_loss_start"]
    assert json.loads((run.adapter / "adapter_config.json").read_text())["r"] == (8 if mode == "continue" else 12)


@pytest.mark.parametrize("format", ["lora", "merged_16bit", "merged_4bit", "gguf"])
def test_exports_read_back(format: str, trained: Run, base: Path, tmp_path: Path) -> None:
    # In a process of its own, as a worker's child is: Unsloth, imported here, has patched transformers' Llama.
    spec: dict[str, Any] = {"kind": "export", "adapter": "a", "format": format, "base": str(base)}
    if format == "gguf":
        pytest.importorskip("xllamacpp")
        spec["quantization_method"] = ["f16", "q8_0", "q4_k_m"]
    script = (
        "import json, sys; from pathlib import Path; from tests.recipes import run_recipe; "
        "run = run_recipe(json.loads(sys.argv[1]), Path(sys.argv[2]), parent=Path(sys.argv[3])); "
        "print(json.dumps(run.outcome.result['verification']))"
    )
    arguments = [json.dumps(spec), str(tmp_path), str(trained.adapter)]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    print(format, report)
    for each in report["files"] if format == "gguf" else [report]:
        assert each["mean_kl"] <= each["limit"]


def test_a_tied_base_gets_two_matrices(rows: Path, tmp_path: Path) -> None:
    tied = make_tiny_base(tmp_path / "tied", tie=True, hidden=256, intermediate=512)
    run = run_recipe(cpt_spec(tied, training={"max_steps": 4}), tmp_path / "run", file=rows)
    state = load_file(run.adapter / "adapter_model.safetensors")
    embed, head = (state[f"base_model.model.{k}.weight"].float() for k in ("model.embed_tokens", "lm_head"))
    assert not torch.equal(embed, head)


def test_loftq_and_dropout_and_checkpoints(base: Path, rows: Path, tmp_path: Path) -> None:
    spec = cpt_spec(
        base,
        model={"load_in_4bit": True},
        lora={"loftq_config": {}, "lora_dropout": 0.05},
        training={"max_steps": 6, "gradient_checkpointing": True},
    )
    run = run_recipe(spec, tmp_path, file=rows)
    assert run.progress.records["gradient_checkpointing"]["used"]
    assert list(run.progress.present) == [3, 6]
    assert run.outcome.result["eval_loss"] < run.outcome.result["eval_loss_start"]
