"""Running a recipe in the test's own process: a tiny base, rows made here, and a Progress that keeps what it is told."""

from __future__ import annotations

import importlib
import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from service.settings import Settings
from service.specs import parse_spec
from worker.outcome import Ask, Context, Outcome, Paths

WORDS = "the cat sat on a mat and then some more words came to be read by many people"
TRAINING = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "per_device_eval_batch_size": 4,
    "max_steps": 6,
    "logging_steps": 1,
    "eval_steps": 3,
    "save_steps": 3,
    "learning_rate": 1e-3,
    "embedding_learning_rate": 1e-4,
}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def texts(path: Path, n: int = 60, words: int = 40, seed: int = 0) -> Path:
    """A .jsonl of {title, text} rows of random words."""
    rnd = random.Random(seed)
    return write_rows(
        path, [{"title": f"t{i}", "text": " ".join(rnd.choices(WORDS.split(), k=words))} for i in range(n)]
    )


def chats(path: Path, n: int = 60, seed: int = 1) -> Path:
    """A .jsonl of one-turn conversations."""
    rnd = random.Random(seed)
    return write_rows(
        path,
        [
            {
                "messages": [
                    {"role": "user", "content": f"say {i}"},
                    {"role": "assistant", "content": " ".join(rnd.choices(WORDS.split(), k=8))},
                ]
            }
            for i in range(n)
        ],
    )


def cpt_spec(base: Path, **changes: Any) -> dict[str, Any]:
    """A small cpt spec; `training`, `lora`, `model` and `dataset` are merged into it."""
    spec: dict[str, Any] = {
        "kind": "cpt",
        "adapter": "a",
        "model": {"name": str(base), "max_seq_length": 64, "load_in_4bit": False},
        "lora": {"r": 8, "lora_alpha": 16},
        "dataset": {"file_id": "file-x", "test_size": 0.2, "template": {"prompt": "# {title}\n{text}"}},
        "training": TRAINING,
    }
    for key, value in changes.items():
        spec[key] = {**spec[key], **value} if isinstance(value, dict) and key in spec else value
    return spec


def ift_spec(base: Path, **changes: Any) -> dict[str, Any]:
    """As cpt_spec, over conversations."""
    dataset = {"template": {"chat_template": "default"}, **changes.pop("dataset", {})}
    return {**cpt_spec(base, dataset=dataset, **changes), "kind": "ift"}


@dataclass
class Recorder:
    """A Progress that keeps everything; `ask_at` asks the run to end once that step was reported."""

    ask_at: tuple[int, Ask] | None = None
    phases: list[str] = field(default_factory=list)
    points: dict[str, dict[int, dict[str, Any]]] = field(default_factory=lambda: {"train": {}, "eval": {}})
    records: dict[str, Any] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    logged: list[str] = field(default_factory=list)
    present: dict[int, dict[str, Any]] = field(default_factory=dict)
    resumed_from: int | None = None
    step: int = 0

    def phase(self, name: str) -> None:
        self.phases.append(name)

    def log(self, message: str) -> None:
        self.logged.append(message)

    def started(self) -> None: ...

    def steps(self, values: dict[str, Any]) -> None:
        self.step = values.get("step", self.step)
        self.values |= values

    def metrics(self, split: str, step: int, point: dict[str, Any]) -> None:
        self.points[split][step] = point

    def resumed(self, step: int) -> None:
        self.resumed_from = step

    def checkpoints(self, present: dict[int, dict[str, Any]]) -> None:
        self.present = present

    def record(self, values: dict[str, Any]) -> None:
        self.records |= values

    def asked(self) -> Ask | None:
        if self.ask_at and self.step >= self.ask_at[0] - 1:  # asked while that step is under way
            return self.ask_at[1]
        return None

    @property
    def losses(self) -> dict[int, float]:
        return {step: point["loss"] for step, point in self.points["train"].items()}

    @property
    def eval_losses(self) -> dict[int, float]:
        return {step: point["eval_loss"] for step, point in self.points["eval"].items()}


@dataclass
class Run:
    outcome: Outcome
    progress: Recorder
    paths: Paths

    @property
    def adapter(self) -> Path:
        return self.paths.out_dir

    @property
    def checkpoints(self) -> Path:
        return self.paths.run_dir / "checkpoints"


def run_recipe(
    spec: dict[str, Any],
    folder: Path,
    *,
    file: Path | None = None,
    parent: Path | None = None,
    ask_at: tuple[int, Ask] | None = None,
    devices: list[str] | None = None,
    data_dir: Path | None = None,
) -> Run:
    """Run a spec's recipe in `folder` (again, to go on from its checkpoints) and return how it went.

    With `devices` in a process for each, else in this one. `data_dir`: a data folder shared with other runs.
    """
    spec = dict(spec)
    base = spec["model"]["name"] if "model" in spec else str(spec.pop("base"))  # an export's base is its adapter's
    parsed = parse_spec(spec)
    settings = Settings(data_dir=data_dir or folder / "data")
    paths = Paths(run_dir=folder / "run", out_dir=folder / "out", base=base, file=file, parent=parent)
    paths.run_dir.mkdir(parents=True, exist_ok=True)
    progress = Recorder(ask_at=ask_at)
    about = {"base": base, "kind": spec["kind"], "job": "job_x", "name": spec["adapter"], "lineage": {}}
    context = Context(paths=paths, progress=progress, settings=settings, about=about, token=None)
    if devices:
        from worker import launch

        return Run(launch.run(parsed, context, devices), progress, paths)
    module = {"cpt": "worker.cpt", "ift": "worker.ift", "export": "worker.export.job"}[spec["kind"]]
    if spec["kind"] != "export":
        importlib.import_module("unsloth")
    return Run(importlib.import_module(module).run(parsed, context), progress, paths)


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.adapter / "adapter_model.safetensors")


def assert_same(one: Run, other: Run) -> None:
    """Losses at each step, evaluation losses and weights within rounding."""
    assert one.progress.losses.keys() == other.progress.losses.keys()
    for step, loss in one.progress.losses.items():
        assert other.progress.losses[step] == pytest.approx(loss, abs=1e-4)
    assert one.progress.eval_losses.keys() == other.progress.eval_losses.keys()
    for step, loss in one.progress.eval_losses.items():
        assert other.progress.eval_losses[step] == pytest.approx(loss, abs=1e-4)
    assert one.outcome.result["tokens"] == other.outcome.result["tokens"]
    theirs = weights(other)
    for name, weight in weights(one).items():
        assert torch.allclose(weight, theirs[name], atol=2e-4), name
