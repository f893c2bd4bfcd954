"""What an export's folder holds beside the weights: configuration, tokenizer, template, model card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from service.templates import StoredTemplate
from worker import adapter_io, record
from worker.base_model import on_hub
from worker.export import template as templates
from worker.export.plan import Plan, Skeleton
from worker.export.weights import BaseWeights
from worker.files import MANIFEST, write_json

# What a training leaves beside an adapter or a checkpoint that is nobody else's business.
INTERNAL = (
    adapter_io.PROBE, "trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin",
    "lorry_trainer.json", "scaler.pt",
)  # fmt: skip
KINDS = {
    "lora": ("peft", "a LoRA adapter"),
    "merged_16bit": ("transformers", "a merged 16-bit model"),
    "merged_4bit": ("transformers", "a merged model in 4 bits (bitsandbytes NF4)"),
    "gguf": ("gguf", "a merged model as GGUF"),
}


def write_lora(adapter: Path, about: dict[str, Any], folder: Path) -> None:
    """Copy the PEFT folder; the base is named as the world knows it, not by a local path."""
    for path in adapter.iterdir():
        if path.is_file() and path.name not in INTERNAL:
            shutil.copy2(path, folder / path.name)
    config = json.loads((folder / adapter_io.CONFIG).read_text("utf-8"))
    write_json(folder / adapter_io.CONFIG, {**config, "base_model_name_or_path": about["base"]})


def write_template(adapter: Path, t: StoredTemplate, tokenizer: Any, folder: Path) -> None:
    """The tokenizer with the served template, and lorry's record of that template."""
    templates.prepare_tokenizer(tokenizer, t, folder)
    shutil.copy2(adapter / "lorry_template.json", folder / "lorry_template.json")


def write_configs(
    base: BaseWeights,
    plan: Plan,
    model: Skeleton,
    folder: Path,
    *,
    dtype: torch.dtype,
    ends: list[int],
    nf4: bool = False,
) -> None:
    """config.json and generation_config.json of the merged model: the base's own, less its quantisation.

    `dtype` is that of the values; with `nf4` the linear layers but those left out are said to be in bitsandbytes' NF4.
    """
    config = {k: v for k, v in base.config.items() if k not in ("quantization_config", "_name_or_path")}
    name = str(dtype).removeprefix("torch.")
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            part["torch_dtype" if "torch_dtype" in part else "dtype"] = name
            if plan.untied and (part is config or "tie_word_embeddings" in part):
                part["tie_word_embeddings"] = False
    if nf4:
        from transformers import BitsAndBytesConfig

        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=sorted(model.kept),
        )
        config["quantization_config"] = quantization.to_dict()
    write_json(folder / "config.json", config)
    source = base.folder / "generation_config.json"
    generation = json.loads(source.read_text("utf-8")) if source.is_file() else {"_from_model_config": True}
    if ends:
        generation["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    write_json(folder / "generation_config.json", generation)


def write_card(format: str, adapter: str, about: dict[str, Any], folder: Path) -> None:
    """A model card: what it is, from which base and jobs."""
    library, what = KINDS[format]
    base = on_hub(about["base"])
    # The hub refuses a card whose base_model is no repository of its own, such as a folder.
    named = f"base_model: {base}\n" if base else ""
    text = f"""---
library_name: {library}
pipeline_tag: text-generation
{named}tags: [lora, lorry]
---

# {adapter}

This is {what} trained with lorry ({about["kind"]}, job {about["job"]}, step {about.get("step")}) on the base model
{base or Path(about["base"]).name}. The prompt template it was trained with is in `lorry_template.json` and, for chats, in
`chat_template.jinja`. `manifest.json` lists the files with their SHA-256 and how they were verified.
"""
    (folder / "README.md").write_text(text, encoding="utf-8")


def write_manifest(
    folder: Path,
    format: str,
    adapter: str,
    about: dict[str, Any],
    stored: StoredTemplate,
    files: list[dict[str, Any]],
    verification: dict[str, Any] | None,
    **more: Any,
) -> None:
    """Write manifest.json: what the folder is, where it comes from, how it was verified, what it holds."""
    manifest = {
        "format": format,
        "adapter": adapter,
        "base": about["base"],
        "revision": about.get("revision"),
        **more,
        "lineage": {
            "job": about["job"],
            "step": about.get("step"),
            "data_fingerprint": about.get("data_fingerprint"),
            **(about.get("lineage") or {}),
        },
        "template": stored.fingerprint,
        "versions": record.versions(),
        "verification": verification,
        "files": files,
    }
    write_json(folder / MANIFEST, manifest)
