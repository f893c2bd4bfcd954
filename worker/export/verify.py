"""Reading an export back with the tool that will load it, and the limits of how far it may be from the live adapter."""

from __future__ import annotations

import filecmp
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from service.errors import JobFailure
from service.templates import StoredTemplate
from worker import adapter_io
from worker.export import fingerprint, load, reference, template
from worker.export.source import Source
from worker.export.weights import open_base


@dataclass(frozen=True)
class Limit:
    """Mean KL (nats) from the live adapter over all positions of the probe; docs/exports.md has the measurements.

    A model that is sure of nothing, or an adapter that does little, would pass any absolute limit: an export may also be
    no further than `share` of the adapter's effect (the KL from it to its base), unless that is less than `noise`, which
    the format's rounding may take.
    """

    mean_kl: float
    share: float | None = None
    noise: float = 0.0

    def allowed(self, effect: float) -> float:
        if self.share is None:
            return self.mean_kl
        return min(self.mean_kl, max(self.noise, self.share * effect))


LIMITS = {
    "lora": Limit(1e-4, share=0.05, noise=1e-6),
    "merged_16bit": Limit(1e-2, share=0.05, noise=1e-3),
    "merged_4bit": Limit(0.5),
}


def read_back(
    format: str,
    folder: Path,
    source: Source,
    stored: StoredTemplate,
    expected: reference.Reference,
    step: Callable[[int, int], None],
) -> dict[str, Any]:
    """The report on an export of the formats that PEFT and transformers load; `problems` says what is wrong, if anything.

    `step(done, total)` is called between rows of the probe and may raise.
    """
    problems: list[str] = []
    report: dict[str, Any] = {"reader": "peft" if format == "lora" else "transformers", **source.place.report()}
    try:
        report["template"] = template.check(folder, stored, AutoTokenizer.from_pretrained(source.adapter))
    except JobFailure as failure:
        problems.append(failure.message)
    report["tensor_types"] = dict(tensor_types(folder))
    problems += check_types(format, folder, source)
    if format == "lora" and not filecmp.cmp(
        folder / adapter_io.WEIGHTS, source.adapter / adapter_io.WEIGHTS, shallow=False
    ):
        problems.append(f"{adapter_io.WEIGHTS} is not the adapter's")
    model, lost = read(format, folder, source)
    problems += lost
    compared = reference.compare(model, expected, step)
    del model
    load.free(source.place)
    limit = LIMITS[format].allowed(expected.effect)
    report |= {**compared.report(), "limit": limit}
    if not compared.mean_kl <= limit:  # also true for NaN
        problems.append(f"mean KL {compared.mean_kl:.3g} over the limit {limit:.3g}")
    if format == "merged_4bit":
        report["bits_per_weight"] = bits_per_weight(folder, source)
    return {**report, "problems": problems}


def same_weights(folder: Path, peft: dict[str, torch.Tensor]) -> tuple[dict[str, Any], list[str]]:
    """Compare a merged folder with the projections of PEFT's own merge; the report, and what is wrong."""
    found = fingerprint.compare(open_base(str(folder), revision=None, token=None), peft, lambda: None)
    problems = []
    if not found["largest_difference"] <= fingerprint.TOLERANCE:
        problems.append(f"{found['tensor']} differs from PEFT's merge by {found['largest_difference']:.2g}")
    return {**found, "limit": fingerprint.TOLERANCE}, problems


def read(format: str, folder: Path, source: Source) -> tuple[Any, list[str]]:
    """Load an export as its users do; also which tensors were missing, left over or of another shape."""
    if format == "lora":
        base = load.load_live(
            source.name, folder, source.place, source.load_in, revision=source.revision, hub=source.hub
        )
        assert isinstance(base, PeftModel)
        return base, []
    kwargs = {**source.place.kwargs, "trust_remote_code": source.hub["trust_remote_code"]}
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **kwargs)
    lost = [f"{key}: {', '.join(sorted(map(str, names))[:3])}" for key, names in info.items() if names]
    return model, lost


def tensor_types(folder: Path) -> Counter[str]:
    """How many tensors of which type a folder's safetensors hold, read from the files, e.g. {'BF16': 290}."""
    types: Counter[str] = Counter()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            types.update(file.get_slice(key).get_dtype() for key in file.keys())  # noqa: SIM118
    return types


def check_types(format: str, folder: Path, source: Source) -> list[str]:
    """What a merged folder's files hold that is not as it should be: names, and for 4 bits NF4 where it belongs."""
    if format == "lora":
        return []
    found: dict[str, str] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
    problems = []
    for planned in source.plan.tensors:
        in_nf4 = format == "merged_4bit" and planned.linear
        dtype = found.get(planned.name)
        state = f"{planned.name}.quant_state.bitsandbytes__nf4" in found
        if dtype is None:
            problems.append(f"{planned.name} is not in the files")
        elif in_nf4 != (dtype == "U8" and state):
            problems.append(f"{planned.name} is {dtype}, {'not NF4' if in_nf4 else 'in 4 bits'}")
    return problems[:3]


def bits_per_weight(folder: Path, source: Source) -> dict[str, float]:
    """Bits a weight takes in the files: over all of them, and over those in NF4 with what is needed to undo it."""
    total = torch.Size
    sizes: dict[str, int] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                part = file.get_slice(key)
                width = {"U8": 1, "BF16": 2, "F16": 2, "F32": 4}.get(part.get_dtype(), 8)
                sizes[key] = total(part.get_shape()).numel() * width
    linear = [p for p in source.plan.tensors if p.linear]
    packed = sum(n for key, n in sizes.items() if any(key == p.name or key.startswith(f"{p.name}.") for p in linear))
    return {
        "all": 8 * sum(sizes.values()) / sum(total(p.shape).numel() for p in source.plan.tensors),
        "nf4": 8 * packed / max(1, sum(total(p.shape).numel() for p in linear)),
    }
