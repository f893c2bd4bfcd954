"""What an export is made from: the adapter, the base's weights, and as what those were trained on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from service.errors import JobFailure
from service.specs import ExportSpec
from worker.base_model import resolve
from worker.export import load
from worker.export.nf4 import Quantization
from worker.export.plan import Plan, Skeleton, plan_merge, same_model, skeleton
from worker.export.weights import HALF, BaseWeights, open_base
from worker.outcome import Context


@dataclass(frozen=True)
class Source:
    """Everything decided before the first tensor is written."""

    adapter: Path
    about: dict[str, Any]  # the adapter's lorry_adapter.json
    name: str  # folder or hub id of the base that is merged into
    revision: str | None
    hub: dict[str, Any]
    base: BaseWeights
    model: Skeleton
    plan: Plan
    dtype: torch.dtype  # of the merged values
    load_in: dict[str, Any]  # quantization_config with which transformers loads the base as it was trained on
    quantization: Quantization | None  # how training held a base whose files have 16 bits
    merged_into: dict[str, Any]
    place: load.Place

    def trained_on(self, tensor: str) -> Quantization | None:
        return self.quantization if tensor in self.model.linear else None


def open_source(spec: ExportSpec, context: Context, adapter: Path, about: dict[str, Any]) -> Source:
    """Open the base, or the 16-bit original that the spec names, and plan the merge.

    The same model that was trained is the default: a base that training held in 4 bits is rounded as it was then.
    Raises JobFailure before anything is written.
    """
    name, revision, hub = context.paths.base, about.get("revision"), context.hub
    base = open_base(name, revision=revision, token=context.token)
    trained = about.get("trained_on") or {}
    quantization_config = trained.get("quantization_config")
    if spec.base is not None:
        name, revision, base = _original(spec.base, base, context)
        quantization_config = None
    quantization = None
    if quantization_config and not base.quantized:
        quantization = Quantization.of(quantization_config, trained["dtype"])
    if spec.base is not None:
        weights = "16-bit original"
    elif base.quantized:
        weights = "dequantised 4-bit base"
    elif quantization:
        weights = f"dequantised {quantization.quant_type} of the base's weights, as in training"
    else:
        weights = "the base's own"
    config = base.config.get("quantization_config") or quantization_config or {}
    model = skeleton(base, keep=config.get("llm_int8_skip_modules"), **hub)
    dtype = base.dtype if base.dtype in HALF else torch.bfloat16
    if spec.format == "gguf":
        dtype = torch.float32  # an intermediate: each GGUF type is rounded to from here, once
    plan = plan_merge(base, adapter, model, dtype=dtype if spec.format == "gguf" else None)
    parameters = sum(torch.Size(p.shape).numel() for p in plan.tensors)
    return Source(
        adapter=adapter,
        about=about,
        name=name,
        revision=revision,
        hub=hub,
        base=base,
        model=model,
        plan=plan,
        dtype=dtype,
        load_in={"quantization_config": quantization_config if quantization else None},
        quantization=quantization,
        merged_into={
            "weights": weights,
            "base": spec.base or about["base"],
            "revision": revision,
            **({"commit": base.commit} if base.commit else {}),
            "dtype": str(base.dtype).removeprefix("torch."),
        },
        place=load.place(parameters, base.dtype if base.dtype in HALF else torch.bfloat16),
    )


def _original(named: str, trained: BaseWeights, context: Context) -> tuple[str, str | None, BaseWeights]:
    name = resolve(named, context.settings)
    original = open_base(name, revision=None, token=context.token)
    if original.quantized:
        raise JobFailure("invalid_spec", f"base: {named} is quantised itself; name the 16-bit original")
    differences = same_model(trained, original)
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise JobFailure("invalid_spec", f"base: {named} is another model: {'; '.join(differences[:3])}{more}")
    return name, None, original
