"""Folding an adapter into its base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


def merge_into_base(model: Any, adapter: Path) -> Any:
    """Fold an adapter folder, trained embeddings included, into a model that is not quantised; returns the plain model."""
    return merge(PeftModel.from_pretrained(model, adapter))


def merge(model: PeftModel) -> Any:
    """Fold the active adapter into its base; returns the plain model.

    With trained embeddings a tied base becomes untied: embed_tokens and lm_head were trained apart.
    """
    merged: Any = model.merge_and_unload()
    if merged.get_input_embeddings().weight is not merged.get_output_embeddings().weight:
        merged.config.tie_word_embeddings = False
    for parameter in merged.parameters():
        parameter.requires_grad_(False)
    return merged


def load_plain(
    base: str, *, revision: str | None, token: str | None, trust_remote_code: bool
) -> tuple[Any, torch.dtype]:
    """The base in float32 through transformers, a 4-bit one dequantised, and the type its 16-bit export is stored in.

    That type is the base's own if it has 16 bits, else bfloat16.
    """
    model = AutoModelForCausalLM.from_pretrained(
        base, revision=revision, token=token, trust_remote_code=trust_remote_code, dtype="auto", low_cpu_mem_usage=True
    )
    stored = model.dtype if model.dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
    if getattr(model, "is_quantized", False):
        model = model.dequantize()
        model.config.quantization_config = None
    return model.float(), stored


def write_merged(model: Any, tokenizer: Any, dtype: torch.dtype, folder: Path) -> None:
    """Write a transformers folder in `dtype`: one rounding, from float32. Changes `model`."""
    model.to(dtype)
    model.config.dtype = dtype
    model.config.name_or_path = ""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
