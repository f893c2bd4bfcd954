"""Adapters made without training, and exports of them in the test's own process."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from service.settings import Settings
from service.specs import ExportSpec, parse_spec
from service.templates import StoredTemplate
from tests.recipes import WORDS, Recorder
from worker import adapter_io
from worker.export import job
from worker.outcome import Ask, Context, Outcome, Paths

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def chat_template(base: Path, **changes: Any) -> StoredTemplate:
    """The base's own chat template, as training stores it."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    values = {
        "kind": "chat", "chat_template": tokenizer.chat_template, "raw_bos": tokenizer.bos_token, "eos": tokenizer.eos_token,
        "bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token, "pad_token": tokenizer.pad_token,
        "stop": [tokenizer.eos_token],
    }  # fmt: skip
    return StoredTemplate(**{**values, **changes})


def make_adapter(
    base: Path,
    folder: Path,
    *,
    template: StoredTemplate | None = None,
    embeddings: list[str] | None = None,
    size: float = 0.05,
    trained_on: dict[str, Any] | None = None,
    seed: int = 1,
    **lora: Any,
) -> Path:
    """A LoRA with random weights of standard deviation `size` on all of its matrices, saved as a training saves it."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    values = {"r": 8, "lora_alpha": 16, "use_rslora": True, "target_modules": PROJECTIONS, **lora}
    peft_model = get_peft_model(model, LoraConfig(**values, modules_to_save=embeddings, task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in peft_model.named_parameters():
        if parameter.requires_grad:
            scale = size * (0.2 if "modules_to_save" in name else 1)
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.data = noise if ".lora_" in name else parameter.data + noise
    tokenizer = AutoTokenizer.from_pretrained(base)
    words = WORDS.split()
    probe = [tokenizer(" ".join(words[i:] + words[:i]), add_special_tokens=False)["input_ids"][:32] for i in range(6)]
    about = {
        "base": str(base),
        "revision": None,
        "kind": "ift",
        "job": "job_t",
        "name": "a",
        "step": 3,
        "lineage": {"jobs": []},
    }
    about |= {
        "trained_on": trained_on or {"dtype": "float32", "quantization_config": None},
        "data_fingerprint": "f" * 64,
    }
    folder.mkdir(parents=True)
    stored = template or chat_template(base)
    adapter_io.save(peft_model, tokenizer, stored, about, probe, folder, parent=None, base=str(base))
    return folder


def quantized_copy(base: Path, folder: Path) -> Path:
    """The base in NF4, as transformers stores it."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, quantization_config=NF4)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def peft_merged(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """The float32 state of base + adapter as PEFT's merge_and_unload has it."""
    live = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    state: dict[str, torch.Tensor] = live.merge_and_unload().state_dict()
    return state


@dataclass
class Watcher(Recorder):
    """A Recorder that keeps the steps of each phase, and asks the run to end once it is in a given phase."""

    ask_in: str | None = None
    steps_in: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    what: Ask = "cancel"

    def steps(self, values: dict[str, Any]) -> None:
        self.steps_in.setdefault(self.phases[-1], []).append((values["step"], values["total_steps"]))

    def asked(self) -> Ask | None:
        return self.what if self.ask_in and self.phases and self.phases[-1] == self.ask_in else None


@dataclass
class Export:
    outcome: Outcome
    progress: Watcher
    folder: Path

    @property
    def report(self) -> dict[str, Any]:
        report: dict[str, Any] = self.outcome.result["verification"]
        return report

    @property
    def manifest(self) -> dict[str, Any]:
        manifest: dict[str, Any] = json.loads((self.folder / "manifest.json").read_text())
        return manifest


@dataclass
class Exporter:
    """Exports of adapters of one base, each in a folder of its own below `root`."""

    root: Path
    base: Path
    number: int = 0

    def paths(self, adapter: Path) -> Paths:
        home = self.root / str(self.number)
        run_dir, out_dir = home / "jobs" / "job_e", home / "exports" / "job_e"
        run_dir.mkdir(parents=True, exist_ok=True)
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        return Paths(run_dir=run_dir, out_dir=out_dir, base=str(self.base), parent=adapter)

    def __call__(
        self,
        adapter: Path,
        *,
        again: bool = False,
        ask_in: str | None = None,
        before: Callable[[Paths], Any] | None = None,
        settings: Settings | None = None,
        **spec: Any,
    ) -> Export:
        """Run an export; `again` in the folder of the last one. `before` sees the paths first."""
        self.number += 0 if again else 1
        paths = self.paths(adapter)
        if before:
            before(paths)
        progress = Watcher(ask_in=ask_in)
        settings = settings or Settings(data_dir=self.root / "data")
        context = Context(paths=paths, progress=progress, settings=settings, about={"job": "job_e"}, token=None)
        return Export(job.run(self.spec(**spec), context), progress, paths.out_dir)

    @staticmethod
    def spec(**values: Any) -> ExportSpec:
        spec = parse_spec({"kind": "export", "adapter": "a", **values})
        assert isinstance(spec, ExportSpec)
        return spec

    @property
    def home(self) -> Path:
        """The folder of the last export."""
        return self.root / str(self.number)

    def left(self) -> list[str]:
        """What the last export left of itself: files and folders below exports/ and its run folder."""
        return sorted(
            p.relative_to(self.home).as_posix() for d in ("exports", "jobs/job_e") for p in (self.home / d).iterdir()
        )
