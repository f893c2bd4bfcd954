"""The dry run of an export: what would be written, and the disk and memory that it takes. Needs the base's files here."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from service.errors import JobFailure
from service.specs import ExportSpec
from worker import adapter_io
from worker.base_model import resolve
from worker.export import gguf_lora, llama_cpp
from worker.export.source import Source, open_source
from worker.export.space import needed_bytes
from worker.outcome import Context, Paths, Silent

if TYPE_CHECKING:
    from worker.dry_run import Request


def export_report(request: Request, token: str | None, held: ExitStack) -> dict[str, Any]:
    """`export`, `disk` and `memory` of the report. Raises JobFailure where the export would."""
    from worker.dry_run import disk_of, use

    spec = request.spec
    assert isinstance(spec, ExportSpec)
    adapter = use(request, held, request.parent, "adapter_not_found", "the files of its adapter are gone")
    if adapter is None:
        why = f"the adapter {request.awaits!r} is still to be made by a job in `after`"
        return {"export": {"format": spec.format, "why": why}}
    base = resolve(request.base, request.settings)
    about = json.loads((adapter / "lorry_adapter.json").read_text("utf-8"))
    probe: list[list[int]] = json.loads((adapter / adapter_io.PROBE).read_text("utf-8"))
    # No folder is made: the export's would be in this one.
    paths = Paths(run_dir=request.settings.data_dir, out_dir=request.settings.exports_dir, base=base, parent=adapter)
    context = Context(paths=paths, progress=Silent(), settings=request.settings, about=about, token=token)
    if spec.methods:
        llama_cpp.find(request.settings)
    try:
        source = open_source(spec, context, adapter, about)
    except JobFailure as failure:
        named = spec.base or request.base
        if failure.code == "model_not_found" and not Path(resolve(named, request.settings)).is_dir():
            why = f"the files of {named} are not on this host, and a dry run fetches no weights"
            return {"export": {"format": spec.format, "why": why}}
        raise
    if spec.format == "lora" and spec.methods:
        gguf_lora.alpha(source)
    needed = needed_bytes(spec, source, probe if spec.verify else [])
    disk = disk_of(request.settings, needed)
    if not disk["fits"]:
        raise JobFailure(
            "insufficient_storage",
            f"the export needs {needed:,} bytes on the data folder's disk, {disk['free_bytes']:,} are free",
        )
    return {"export": _written(spec, source), "disk": disk, "memory": _memory(spec, source)}


def _written(spec: ExportSpec, source: Source) -> dict[str, Any]:
    types: dict[str, int] = {}
    for planned in source.plan.tensors:
        name = "nf4" if spec.format == "merged_4bit" and planned.linear else str(planned.dtype).removeprefix("torch.")
        types[name] = types.get(name, 0) + 1
    merged = spec.format != "lora"
    return {
        "format": spec.format,
        "methods": spec.methods,
        "merged_into": source.merged_into if merged else None,
        "tensor_types": types if merged and spec.format != "gguf" else None,
        "untied": source.plan.untied if merged else None,
    }


def _memory(spec: ExportSpec, source: Source) -> dict[str, Any]:
    """The model that answers are compared on, if they are; the merge itself holds one tensor at a time in float32."""
    largest = max((torch.Size(p.shape).numel() for p in source.plan.tensors), default=0)
    parts = {
        "largest_tensor": 4 * largest if spec.format != "lora" else 0,
        "verification": source.place.bytes if spec.verify else 0,
    }
    return {
        "device": source.place.device.type,
        "peak_bytes": sum(parts.values()),
        "parts": parts,
        "phase": "verification" if spec.verify else "merge",
        "of": "this host",
    }
