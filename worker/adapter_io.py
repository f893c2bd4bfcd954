"""Adapter folders: PEFT's two files, the tokenizer, the stored template and lorry's own record of what it is."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from service.templates import StoredTemplate
from worker.files import write_json

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PROBE = "lorry_probe.json"  # token ids of up to 16 evaluation rows: what exports are compared on


def is_embedding(key: str) -> bool:
    """Whether a key of adapter_model.safetensors is a fully trained embed_tokens or lm_head."""
    return key.endswith(("embed_tokens.weight", "lm_head.weight"))


def scaling(config: dict[str, Any]) -> float:
    """lora_alpha / r, or lora_alpha / sqrt(r) for rsLoRA."""
    return float(config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"]))


def describe(folder: Path) -> dict[str, Any]:
    """What the adapter's row says of it, read back from its files."""
    config = json.loads((folder / CONFIG).read_text())
    return {
        "r": config["r"],
        "lora_alpha": config["lora_alpha"],
        "use_rslora": bool(config.get("use_rslora")),
        "target_modules": sorted(config["target_modules"]),
        "train_embeddings": bool(config.get("modules_to_save")),
    }


def save(
    model: Any,
    tokenizer: Any,
    template: StoredTemplate,
    about: dict[str, Any],
    probe: list[list[int]],
    folder: Path,
    *,
    parent: Path | None,
    base: str,
) -> None:
    """Write the trained adapter into `folder`.

    With `parent` (stack, merge) the trained matrices alone would be of no use to a server, so the folder holds the sum
    of both as one adapter of the original base, and `trainable/` what a resumed run loads.
    """
    own = folder / "trainable" if parent else folder
    # save_embedding_layers: modules_to_save are saved anyway; "auto" would ask a hub about the base's vocabulary.
    model.save_pretrained(own, selected_adapters=["default"], save_embedding_layers=False)
    (own / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    config = json.loads((own / CONFIG).read_text())
    config |= {"base_model_name_or_path": base, "inference_mode": True}
    write_json(own / CONFIG, config)
    if parent:
        combine(parent, own, folder)
    tokenizer.save_pretrained(folder)
    # The template that was trained with, also for those who load the folder without lorry.
    if template.chat_template:
        (folder / "chat_template.jinja").write_text(template.chat_template, encoding="utf-8")
    write_json(folder / "lorry_template.json", template.model_dump())
    write_json(folder / "lorry_adapter.json", about)
    write_json(folder / PROBE, probe)


def combine(first: Path, second: Path, out: Path) -> None:
    """Write the sum of two LoRAs as one: B1·A1·s1 + B2·A2·s2 = [B1 B2]·[A1·s1; A2·s2], rank r1 + r2, scaling 1. Exact.

    A module that only one of them targets gets zeros for the other. Embeddings are the second's, else the first's.
    """
    configs = [json.loads((f / CONFIG).read_text()) for f in (first, second)]
    states = [load_file(f / WEIGHTS) for f in (first, second)]
    ranks = [c["r"] for c in configs]
    state: dict[str, torch.Tensor] = {}
    for side in states:
        state |= {k: v for k, v in side.items() if is_embedding(k)}
    modules = sorted({k.rsplit(".lora_A.", 1)[0] for s in states for k in s if ".lora_A." in k})
    for module in modules:
        a_key, b_key = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
        like_a = next(s[a_key] for s in states if a_key in s)
        like_b = next(s[b_key] for s in states if b_key in s)
        a_parts, b_parts = [], []
        for side, config, rank in zip(states, configs, ranks, strict=True):
            if a_key in side:
                a_parts.append(side[a_key].float() * scaling(config))
                b_parts.append(side[b_key].float())
            else:
                a_parts.append(torch.zeros(rank, like_a.shape[1]))
                b_parts.append(torch.zeros(like_b.shape[0], rank))
        state[a_key], state[b_key] = torch.cat(a_parts, 0), torch.cat(b_parts, 1)
    total = sum(ranks)
    targets = sorted({t for c in configs for t in c["target_modules"]})
    saved = sorted({m for c in configs for m in c.get("modules_to_save") or []}) or None
    config = {
        **configs[1],
        "r": total,
        "lora_alpha": total,
        "use_rslora": False,
        "target_modules": targets,
        "modules_to_save": saved,
    }
    save_file({k: v.contiguous() for k, v in state.items()}, out / WEIGHTS, metadata={"format": "pt"})
    write_json(out / CONFIG, config)
