"""An export: write the adapter in a form other tools load, read it back, compare, list it. Read top to bottom."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from service.errors import JobFailure
from service.specs import ExportSpec
from worker import adapter_io, record
from worker.export.merge import load_plain, merge, write_merged
from worker.files import list_files, whole_folder, write_json
from worker.outcome import Context, Outcome, check
from worker.verify_math import agreement, mean_kl, next_token_logprobs

# Mean KL (nats) between the live adapter and what was read back. A PEFT folder is the same weights; a merged model is
# rounded once to 16 bits. docs/exports.md has the measurements these come from.
LIMITS = {"lora": 1e-4, "merged_16bit": 1e-2}
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "lorry_template.json", "lorry_adapter.json")


def run(spec: ExportSpec, context: Context) -> Outcome:
    """Make one export. Raises JobFailure (export_mismatch, unsupported, …), Interrupted and Fenced."""
    progress, paths = context.progress, context.paths
    adapter = paths.parent
    if adapter is None:
        raise JobFailure("adapter_not_found", f"no adapter {spec.adapter}")
    if spec.format not in LIMITS:
        raise JobFailure("unsupported", f"format: {spec.format} is not built yet")
    about = json.loads((adapter / "lorry_adapter.json").read_text())
    probe: list[list[int]] = json.loads((adapter / adapter_io.PROBE).read_text())
    progress.started()
    progress.record({"device": record.device(), "versions": record.versions()})

    progress.phase("loading")
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    base, stored = load_plain(paths.base, revision=about.get("revision"), **context.hub)
    live = PeftModel.from_pretrained(base, adapter)
    expected = [next_token_logprobs(live, ids) for ids in probe] if spec.verify else []
    check(progress)

    report: dict[str, Any] | None = None
    with whole_folder(paths.out_dir) as folder:
        progress.phase("writing")
        if spec.format == "lora":
            write_lora(adapter, about, folder)
        else:
            merged = merge(live)
            write_merged(merged, tokenizer, stored, folder)
            template = adapter / "chat_template.jinja"
            if template.is_file():
                shutil.copy2(template, folder / "chat_template.jinja")
            shutil.copy2(adapter / "lorry_template.json", folder / "lorry_template.json")
            del merged
        write_card(spec, about, folder)
        del live, base
        gc.collect()
        check(progress)
        if spec.verify:
            progress.phase("verifying")
            report = verify(spec, folder, about, probe, expected, context)
            progress.record({"verification": report})
        check(progress)
        # The manifest is written last: a folder without one is no export.
        manifest = {
            "format": spec.format,
            "adapter": spec.adapter,
            "base": about["base"],
            "revision": about.get("revision"),
            "lineage": {"job": about["job"], **(about.get("lineage") or {})},
            "template": json.loads((folder / "lorry_template.json").read_text())["fingerprint"],
            "versions": record.versions(),
            "verification": report,
            "files": list_files(folder),
        }
        write_json(folder / "manifest.json", manifest)
        progress.asked()  # raises Fenced: another run may have made the folder that this one would replace
    result = {
        "format": spec.format,
        "adapter": spec.adapter,
        "bytes": sum(f["bytes"] for f in manifest["files"]),
        "verification": report,
    }
    return Outcome("done", result=result, artifacts=list_files(paths.out_dir))


def write_lora(adapter: Path, about: dict[str, Any], folder: Path) -> None:
    """Copy the PEFT folder with its tokenizer and template; the base is named as the world knows it, not by a local path."""
    internal = {
        adapter_io.PROBE,
        "trainer_state.json",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "training_args.bin",
        "lorry_trainer.json",
        "scaler.pt",
    }
    for path in adapter.iterdir():
        if path.is_file() and path.name not in internal:
            shutil.copy2(path, folder / path.name)
    config = json.loads((folder / "adapter_config.json").read_text())
    write_json(folder / "adapter_config.json", {**config, "base_model_name_or_path": about["base"]})


def write_card(spec: ExportSpec, about: dict[str, Any], folder: Path) -> None:
    """A model card: what it is, from which base and jobs."""
    library = "peft" if spec.format == "lora" else "transformers"
    what = "a LoRA adapter" if spec.format == "lora" else "a merged 16-bit model"
    text = f"""---
library_name: {library}
base_model: {about["base"]}
tags: [lora, lorry]
---

# {spec.adapter}

This is {what} trained with lorry ({about["kind"]}, job {about["job"]}, step {about.get("step")}) on the base model
{about["base"]}. The prompt template it was trained with is in `lorry_template.json` and, for chats, in
`chat_template.jinja`. `manifest.json` lists the files with their SHA-256 and how they were verified.
"""
    (folder / "README.md").write_text(text, encoding="utf-8")


def verify(
    spec: ExportSpec,
    folder: Path,
    about: dict[str, Any],
    probe: list[list[int]],
    expected: list[torch.Tensor],
    context: Context,
) -> dict[str, Any]:
    """Read the export back with the tool that will load it and compare with the live adapter. Raises JobFailure."""
    if spec.format == "lora":
        plain, _ = load_plain(context.paths.base, revision=about.get("revision"), **context.hub)
        model: Any = PeftModel.from_pretrained(plain, folder)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    got = [next_token_logprobs(model, ids) for ids in probe]
    kl = sum(mean_kl(e, g) for e, g in zip(expected, got, strict=True)) / len(probe)
    same = [agreement(e, g) for e, g in zip(expected, got, strict=True)]
    stored = (
        sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})
        if spec.format == "lora"
        else [stored_dtype(folder)]
    )
    report = {
        "rows": len(probe),
        "positions": sum(len(ids) for ids in probe),
        "mean_kl": kl,
        "limit": LIMITS[spec.format],
        "greedy_agreement": sum(same) / len(same),
        "stored_dtypes": stored,
    }
    if not kl <= LIMITS[spec.format]:
        context.progress.record({"verification": report})
        raise JobFailure(
            "export_mismatch",
            f"the export does not answer as the adapter does: mean KL {kl:.3g} over the limit {LIMITS[spec.format]:g}",
        )
    return report


def stored_dtype(folder: Path) -> str:
    """The tensor types in a folder's safetensors, read from the files, e.g. 'BF16'."""
    from safetensors import safe_open

    types: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            types |= {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
    return ", ".join(sorted(types))
