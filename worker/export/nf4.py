"""bitsandbytes' NF4 with double quantisation, tensor by tensor: as training holds a base, and as merged_4bit stores one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from worker.export.shards import Entry

BLOCK, NESTED_BLOCK, STATE_BYTES = 64, 256, 256


@dataclass(frozen=True)
class Quantization:
    """How a weight was held in 4 bits while it was trained on."""

    quant_type: str  # nf4 or fp4
    double: bool
    dtype: torch.dtype  # of the weight before it was quantised

    @classmethod
    def of(cls, config: dict[str, Any], dtype: str) -> Quantization:
        """From a BitsAndBytesConfig as a dict and the model's type."""
        quant_type = config.get("bnb_4bit_quant_type", "fp4")
        return cls(quant_type, bool(config.get("bnb_4bit_use_double_quant")), getattr(torch, dtype))


def round_trip(values: torch.Tensor, how: Quantization) -> torch.Tensor:
    """What training computed with: quantised and dequantised, in float32."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    exact = values.to(how.dtype).float().contiguous()
    packed, state = quantize_4bit(exact, blocksize=BLOCK, compress_statistics=how.double, quant_type=how.quant_type)
    out: torch.Tensor = dequantize_4bit(packed, state)
    return out.reshape(values.shape)


def entries(name: str, shape: tuple[int, ...]) -> list[Entry]:
    """The tensors that one weight becomes, as transformers reads them."""
    n = torch.Size(shape).numel()
    blocks = -(-n // BLOCK)
    return [
        Entry(name, ((n + 1) // 2, 1), torch.uint8),
        Entry(f"{name}.absmax", (blocks,), torch.uint8),
        Entry(f"{name}.nested_absmax", (-(-blocks // NESTED_BLOCK),), torch.float32),
        Entry(f"{name}.nested_quant_map", (256,), torch.float32),
        Entry(f"{name}.quant_map", (16,), torch.float32),
        Entry(f"{name}.quant_state.bitsandbytes__nf4", (STATE_BYTES,), torch.uint8),
    ]


def pieces(name: str, values: torch.Tensor, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Quantise float32 `values` to NF4; `dtype` is the type they are dequantised to."""
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(values.contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
    state.dtype = dtype
    yield name, packed
    for key, tensor in state.as_dict(packed=True).items():
        if key.startswith("quant_state."):
            # JSON of a length that depends on its numbers: filled up with spaces, so that sizes are known beforehand.
            text = bytes(tensor.cpu().numpy())
            if len(text) > STATE_BYTES:
                raise ValueError(f"{name}: a quantisation state of {len(text)} bytes")
            tensor = torch.frombuffer(bytearray(text.ljust(STATE_BYTES)), dtype=torch.uint8)
        yield f"{name}.{key}", tensor
