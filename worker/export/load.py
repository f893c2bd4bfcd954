"""Models for comparison: the live adapter on the base it was trained on, and exports read back. One at a time."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import psutil
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from service.errors import JobFailure


@dataclass(frozen=True)
class Place:
    """Where and in which type models are compared."""

    device: torch.device
    dtype: torch.dtype
    roomy: bool  # whether a 4-bit base may be dequantised
    bytes: int  # of a model there

    @property
    def kwargs(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "device_map": {"": self.device}, "low_cpu_mem_usage": True}

    def report(self) -> dict[str, str]:
        return {"device": self.device.type, "dtype": str(self.dtype).removeprefix("torch.")}


def place(parameters: int, stored: torch.dtype) -> Place:
    """float32 on the GPU if its free memory holds the model, else on the CPU, else there in the base's own type.

    In float32 only the export's own rounding is measured; in 16 bits the computation's comes on top.
    """
    needed = int(parameters * 4 * 1.25) + 2**30
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > needed:
        return Place(torch.device("cuda"), torch.float32, True, 4 * parameters)
    if psutil.virtual_memory().available > needed:
        return Place(torch.device("cpu"), torch.float32, True, 4 * parameters)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Place(device, stored, False, stored.itemsize * parameters)


def load_live(
    base: str, adapter: Path, where: Place, trained_on: dict[str, Any], *, revision: str | None, hub: dict[str, Any]
) -> Any:
    """The adapter on its base through transformers and PEFT: a 4-bit base (stored so, or trained so) is dequantised."""
    quantization = trained_on.get("quantization_config")
    kwargs: dict[str, Any] = {**where.kwargs, "revision": revision, **hub}
    if quantization:
        kwargs["quantization_config"] = BitsAndBytesConfig(
            **{k: v for k, v in quantization.items() if k.startswith(("bnb_4bit_", "llm_int8_skip"))}, load_in_4bit=True
        )
    model = AutoModelForCausalLM.from_pretrained(base, **kwargs)
    if getattr(model, "is_quantized", False) and where.roomy:
        for module in model.modules():
            if isinstance(module, bnb.nn.Linear4bit):
                module.weight.quant_state.dtype = where.dtype  # else a rounding to 16 bits comes in between
        model = model.dequantize(dtype=where.dtype)
        model.config.quantization_config = None
        model.is_quantized = False
        model = model.to(where.dtype)
    return PeftModel.from_pretrained(model, adapter)


@contextmanager
def enough_memory() -> Iterator[None]:
    """Say what helps when a model does not fit. Raises JobFailure("out_of_memory")."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise JobFailure(
            "out_of_memory",
            "verify: the model does not fit into the memory that is free now; stop what else uses it, or export without verify",
        ) from error


def free(where: Place) -> None:
    """Give back the memory of a model that nobody holds any more, before the next is loaded."""
    if where.bytes > 1 << 28:  # looking through all objects takes half a second, which a small model is not worth
        gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
