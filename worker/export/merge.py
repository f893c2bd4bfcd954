"""Folding an adapter into a base that is in memory, to train on (init.mode merge). Exports merge in merge_stream.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel


def merge_into_base(model: Any, adapter: Path) -> Any:
    """Fold an adapter folder, trained embeddings included, into a model that is not quantised; returns the plain model.

    With trained embeddings a tied base becomes untied: embed_tokens and lm_head were trained apart.
    """
    merged: Any = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    if merged.get_input_embeddings().weight is not merged.get_output_embeddings().weight:
        merged.config.tie_word_embeddings = False
    for parameter in merged.parameters():
        parameter.requires_grad_(False)
    return merged
