"""Writing safetensors files tensor by tensor. The library's own writer wants all tensors of a file in memory at once."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from worker.export.weights import NAMES
from worker.files import write_json

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Entry:
    """A tensor to come."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return int(torch.Size(self.shape).numel() * self.dtype.itemsize)


def write_model(
    groups: list[list[Entry]], data: Iterable[Iterator[tuple[str, torch.Tensor]]], folder: Path, *, shard_bytes: int
) -> list[Path]:
    """Write model.safetensors, or shards of at most `shard_bytes` and their index. Syncs each file.

    `groups` are tensors that must share a file, in order; `data` gives for each group the pieces of its tensors:
    (name, values), a tensor's pieces in the order of its elements. Memory: one piece. A group alone larger than
    `shard_bytes` gets a file of its own. Raises ValueError if the pieces do not make up the tensors.
    """
    shards: list[list[list[Entry]]] = [[]]
    size = 0
    for group in groups:
        more = sum(e.bytes for e in group)
        if shards[-1] and size + more > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(group)
        size += more
    n = len(shards)
    names = [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)] if n > 1 else ["model.safetensors"]
    paths, pieces = [], iter(data)
    for name, shard in zip(names, shards, strict=True):
        paths.append(folder / name)
        _write_shard(folder / name, [e for group in shard for e in group], (next(pieces) for _ in shard))
    if n > 1:
        entries = [(e, name) for name, shard in zip(names, shards, strict=True) for group in shard for e in group]
        total = {
            "total_size": sum(e.bytes for e, _ in entries),
            "total_parameters": sum(torch.Size(e.shape).numel() for e, _ in entries),
        }
        write_json(folder / INDEX, {"metadata": total, "weight_map": {e.name: name for e, name in entries}})
    return paths


def _write_shard(path: Path, entries: list[Entry], groups: Iterable[Iterator[tuple[str, torch.Tensor]]]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at, place = 0, {}
    # Widest types first, as the library does it: every tensor then begins at a multiple of its own element size.
    for entry in sorted(entries, key=lambda e: -e.dtype.itemsize):
        end = at + entry.bytes
        header[entry.name] = {"dtype": NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [at, end]}
        place[entry.name] = at
        at = end
    if len(place) != len(entries):
        raise ValueError(f"{path.name}: a tensor stands twice")
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    left = {e.name: e.bytes for e in entries}
    types = {e.name: e.dtype for e in entries}
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.flush()
        for group in groups:
            for name, values in group:
                raw = memoryview(values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
                if values.dtype != types[name] or raw.nbytes > left[name]:
                    raise ValueError(f"{name}: {values.dtype} of {raw.nbytes} bytes does not fit what was announced")
                offset = begin + place[name]
                place[name] += raw.nbytes
                left[name] -= raw.nbytes
                while raw.nbytes:
                    done = os.pwrite(file.fileno(), raw, offset)
                    offset, raw = offset + done, raw[done:]
        short = [name for name, n in left.items() if n]
        if short:
            raise ValueError(f"{path.name}: {', '.join(short[:3])} not written whole")
        os.fsync(file.fileno())
