"""A base model's tensors, read one by one from its safetensors files: 16 or 32 bits, or NF4/FP4 as bitsandbytes stores it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from service.errors import JobFailure

DTYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64, "U8": torch.uint8,
    "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
HALF = (torch.bfloat16, torch.float16)
_STATE = ".quant_state.bitsandbytes__"


@dataclass(frozen=True)
class Stored:
    """One tensor of the base as the model has it; `parts` are the keys of its quantisation state, if it is in 4 bits."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype  # of the values: for 4 bits the type that they are dequantised to
    parts: dict[str, Path] = field(default_factory=dict)


class BaseWeights:
    """The tensors of a base and its config.json. Opens one file at a time; nothing is kept in memory."""

    def __init__(
        self, config: dict[str, Any], tensors: dict[str, Stored], folder: Path, name: str, revision: str | None
    ) -> None:
        self.config, self.tensors, self.folder = config, tensors, folder
        self.name, self.revision = name, revision
        self._open: tuple[Path, Any] | None = None

    @property
    def commit(self) -> str | None:
        """The commit that a hub id's files are of."""
        from transformers.utils.hub import extract_commit_hash

        commit: str | None = extract_commit_hash(str(self.folder / "config.json"), None)
        return commit

    @property
    def quantized(self) -> bool:
        return any(t.parts for t in self.tensors.values())

    @property
    def dtype(self) -> torch.dtype:
        """The type that most values have; for a 4-bit base that of the dequantised ones."""
        count: dict[torch.dtype, int] = {}
        for t in self.tensors.values():
            if t.dtype.is_floating_point:
                count[t.dtype] = count.get(t.dtype, 0) + torch.Size(t.shape).numel()
        return max(count, key=lambda d: count[d])

    def read(self, name: str, device: torch.device) -> torch.Tensor:
        """A tensor: as stored, mapped from its file; one in 4 bits dequantised to float32 on `device`."""
        stored = self.tensors[name]
        with self._file(stored.file) as file:
            tensor: torch.Tensor = file.get_tensor(name)
        if not stored.parts:
            return tensor
        from bitsandbytes.functional import QuantState, dequantize_4bit

        state_dict = {}
        for key, path in stored.parts.items():
            with self._file(path) as file:
                # A copy: a file mapped read-only must not be handed to a library that may write.
                state_dict[key.removeprefix(f"{name}.")] = file.get_tensor(key).clone()
        state = QuantState.from_dict(state_dict, device=device)
        state.dtype = torch.float32  # dequantised without a rounding to 16 bits: the result is rounded once, at the end
        out: torch.Tensor = dequantize_4bit(tensor.to(device).reshape(-1, 1), state)
        return out.reshape(stored.shape)

    @contextmanager
    def _file(self, path: Path) -> Iterator[Any]:
        if self._open is None or self._open[0] != path:
            self.close()
            self._open = (path, safe_open(path, framework="pt"))
        yield self._open[1]

    def close(self) -> None:
        self._open = None


def open_base(base: str, *, revision: str | None, token: str | None) -> BaseWeights:
    """Find the safetensors files of a folder or a hub id (downloaded if they are not in the cache) and read their headers.

    Raises JobFailure: model_not_found, or unsupported for a base without safetensors or in another quantisation.
    """
    try:
        config_file = _file_of(base, "config.json", revision, token)
        if config_file is None:
            raise JobFailure("model_not_found", f"the base {base} has no config.json")
        files = _weight_files(base, revision, token)
        _file_of(base, "generation_config.json", revision, token)  # beside config.json, for those who look there
    except OSError as error:
        raise JobFailure("model_not_found", f"the base {base}: {str(error).splitlines()[0]}") from error
    config = json.loads(config_file.read_text("utf-8"))
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method not in (None, "bitsandbytes"):
        raise JobFailure(
            "unsupported", f"the base {base} is quantised with {method}; only bitsandbytes' 4 bits are merged"
        )
    headers: dict[str, tuple[Path, tuple[int, ...], str]] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                part = file.get_slice(key)
                headers[key] = (path, tuple(part.get_shape()), part.get_dtype())
    return BaseWeights(config, _tensors(base, headers), config_file.parent, base, revision)


def _tensors(base: str, headers: dict[str, tuple[Path, tuple[int, ...], str]]) -> dict[str, Stored]:
    states = {key.split(_STATE)[0]: key for key in headers if _STATE in key}
    parts: dict[str, dict[str, Path]] = {name: {} for name in states}
    for key, (path, _, _) in headers.items():
        owner = key.rsplit(".", 1)[0] if _STATE not in key else key.split(_STATE)[0]
        if owner in parts and key != owner:
            parts[owner][key] = path
    taken = {key for owned in parts.values() for key in owned}
    out: dict[str, Stored] = {}
    for key, (path, shape, dtype) in headers.items():
        if key in taken:
            continue
        if dtype not in DTYPES or key.endswith(".SCB"):
            raise JobFailure("unsupported", f"the base {base} has {key} in a type that is not merged ({dtype})")
        if key not in states:
            out[key] = Stored(key, path, shape, DTYPES[dtype])
            continue
        with safe_open(parts[key][states[key]], framework="pt") as file:
            state = json.loads(bytes(file.get_tensor(states[key]).numpy()))
        values = getattr(torch, state["dtype"])
        out[key] = Stored(key, path, tuple(state["shape"]), values, parts[key])
    return out


def _weight_files(base: str, revision: str | None, token: str | None) -> list[Path]:
    index = _file_of(base, "model.safetensors.index.json", revision, token)
    if index is not None:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        found = [_file_of(base, name, revision, token) for name in names]
        lost = [name for name, path in zip(names, found, strict=True) if path is None]
        if lost:
            raise JobFailure("model_not_found", f"the base {base} lacks {', '.join(lost)}, which its index names")
        return [path for path in found if path is not None]
    single = _file_of(base, "model.safetensors", revision, token)
    if single is None:
        raise JobFailure("unsupported", f"the base {base} has no model.safetensors; only safetensors are read")
    return [single]


def _file_of(base: str, name: str, revision: str | None, token: str | None) -> Path | None:
    from transformers.utils.hub import cached_file

    found = cached_file(base, name, revision=revision, token=token, _raise_exceptions_for_missing_entries=False)
    return Path(found) if found else None
