"""An export: write the adapter in a form other tools load, read it back, compare, list it. Read top to bottom."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from service.errors import JobFailure
from service.specs import ExportSpec
from service.templates import StoredTemplate
from worker import adapter_io, record
from worker.export import fingerprint, gguf, gguf_lora, llama_cpp, load, reference, template, verify
from worker.export import folder as folders
from worker.export.interrupt import interruptible
from worker.export.merge_stream import write_merged
from worker.export.plan import Planned
from worker.export.source import Source, open_source
from worker.export.space import check_space
from worker.files import MANIFEST, list_file, list_files, whole_folder, write_json
from worker.outcome import Context, Outcome, check
from worker.push import push_result


def run(spec: ExportSpec, context: Context) -> Outcome:
    """Make one export. Raises JobFailure (export_mismatch, insufficient_storage, unsupported, …), Interrupted and Fenced."""
    progress, paths = context.progress, context.paths
    adapter = paths.parent
    if adapter is None:
        raise JobFailure("adapter_not_found", f"no adapter {spec.adapter}")
    sweep(paths.out_dir)
    about = json.loads((adapter / "lorry_adapter.json").read_text("utf-8"))
    stored = StoredTemplate.model_validate_json((adapter / "lorry_template.json").read_text("utf-8"))
    probe: list[list[int]] = json.loads((adapter / adapter_io.PROBE).read_text("utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(adapter, trust_remote_code=context.settings.trust_remote_code)
    progress.started()
    versions = record.versions()
    progress.record({"device": record.device(), "versions": versions})

    # What can be known to fail does so before the work: the base's files, the adapter's fit, the disk.
    progress.phase("planning")
    if spec.methods:
        llama_cpp.find(context.settings)
    with interruptible(progress):
        source = open_source(spec, context, adapter, about)
        if spec.format == "lora" and spec.methods:
            gguf_lora.alpha(source)
    check_space(spec, source, paths.out_dir, probe if spec.verify else [])
    progress.record({"merged_into": source.merged_into})

    with scratch(paths.run_dir / "export") as aside:
        expected, weights = None, None
        if spec.verify:
            progress.phase("loading")
            with interruptible(progress) as step, load.enough_memory():
                ends = template.stop_ids(stored, tokenizer)
                expected, weights = ask_adapter(spec, source, probe, ends, aside / "expected", step)
        with whole_folder(paths.out_dir) as folder:
            write(spec, context, source, stored, tokenizer, folder, aside)
            check(progress)
            report = None
            if expected is not None:
                progress.phase("verifying")
                merged = aside / "merged" if spec.format == "gguf" else folder
                checked = (merged, weights) if weights is not None else None
                report = judge(spec, context, source, stored, tokenizer, folder, expected, checked, aside)
                progress.record({"verification": report})
            check(progress)
            # The manifest is written last: a folder without one is no export.
            progress.phase("listing")
            with interruptible(progress):
                files = list_files(folder)
            merged_into = {"merged_into": source.merged_into}
            folders.write_manifest(folder, spec.format, spec.adapter, about, stored, files, report, **merged_into)
            progress.asked()  # raises Fenced: another run may have made the folder that this one would replace
    failure = None
    result = {
        "format": spec.format,
        "adapter": spec.adapter,
        "bytes": sum(f["bytes"] for f in files),
        "merged_into": source.merged_into,
        "verification": report,
    }
    if spec.push_to_hub:
        kept = f"The export is kept; GET /v1/jobs/{context.about['job']}/artifacts lists it"
        try:
            failure = push_result(paths.out_dir, spec.push_to_hub, context, result, kept)
        except BaseException:
            shutil.rmtree(paths.out_dir, ignore_errors=True)  # cancelled, or fenced: no row will name it
            raise
    listed = list_file(paths.out_dir / MANIFEST, paths.out_dir)
    artifacts = sorted([*files, listed], key=lambda f: str(f["path"]))
    return Outcome("done", result=result, artifacts=artifacts, failure=failure)


def write(
    spec: ExportSpec,
    context: Context,
    source: Source,
    stored: StoredTemplate,
    tokenizer: Any,
    folder: Path,
    aside: Path,
) -> None:
    """Write everything but the manifest into `folder`; what is only needed on the way goes to `aside`."""
    progress = context.progress
    if spec.format == "lora":
        progress.phase("writing")
        folders.write_lora(source.adapter, source.about, folder)
        if spec.methods:
            progress.phase("converting")
            with interruptible(progress):
                gguf_lora.write(source, spec, stored, folder, aside, tools=llama_cpp.find(context.settings))
    else:
        progress.phase("merging")
        merged = folder if spec.format != "gguf" else aside / "merged"
        merged.mkdir(exist_ok=True)
        write_merged(
            source.base,
            source.adapter,
            source.plan,
            merged,
            shard_bytes=spec.shard_bytes,
            step=stepper(context),
            trained_on=source.trained_on,
            quantize=in_nf4(spec),
        )
        ends = template.stop_ids(stored, tokenizer)
        folders.write_configs(
            source.base,
            source.plan,
            source.model,
            merged,
            dtype=source.dtype,
            ends=ends,
            nf4=spec.format == "merged_4bit",
        )
    if spec.format == "gguf":
        folders.write_template(source.adapter, stored, tokenizer, merged)
        shutil.copy2(source.adapter / "lorry_template.json", folder / "lorry_template.json")
        tools = llama_cpp.find(context.settings)
        progress.phase("converting")
        with interruptible(progress) as step:
            gguf.write(
                merged,
                spec.methods,
                folder,
                name=spec.adapter,
                template=stored,
                tokenizer=tokenizer,
                tools=tools,
                step=step,
            )
    else:
        folders.write_template(source.adapter, stored, tokenizer, folder)
    folders.write_card(spec.format, spec.adapter, source.about, folder)


def ask_adapter(
    spec: ExportSpec,
    source: Source,
    probe: list[list[int]],
    ends: list[int],
    folder: Path,
    step: Callable[[int, int], None],
) -> tuple[reference.Reference, dict[str, torch.Tensor] | None]:
    """What the live adapter answers to the probe, on the base that the export is made from, and what PEFT merges it to."""
    live = load.load_live(
        source.name, source.adapter, source.place, source.load_in, revision=source.revision, hub=source.hub
    )
    expected = reference.take(live, probe, ends, folder, step)
    weights = None
    if spec.format != "lora" and source.place.dtype == torch.float32:
        weights = fingerprint.of_peft(live, source.plan.tensors, in_nf4(spec), lambda: None)
    del live
    load.free(source.place)
    return expected, weights


def judge(
    spec: ExportSpec,
    context: Context,
    source: Source,
    stored: StoredTemplate,
    tokenizer: Any,
    folder: Path,
    expected: reference.Reference,
    merged: tuple[Path, dict[str, torch.Tensor]] | None,
    aside: Path,
) -> dict[str, Any]:
    """Read the export back and compare. Raises JobFailure("export_mismatch"), the files kept aside.

    `merged` is the transformers folder of the merged model, and what PEFT's own merge gives.
    """
    with interruptible(context.progress) as step, load.enough_memory():
        if spec.format == "gguf":
            tools = llama_cpp.find(context.settings)
            report = gguf.read_back_all(folder, spec, stored, expected, tokenizer=tokenizer, tools=tools, step=step)
        else:
            report = verify.read_back(spec.format, folder, source, stored, expected, step)
            if spec.methods:
                report["gguf"] = gguf_lora.read_back(
                    folder, source, spec, stored, expected, aside,
                    tokenizer=tokenizer, tools=llama_cpp.find(context.settings), step=step,
                )  # fmt: skip
                report["problems"] += report["gguf"].pop("problems")
        if merged is not None:
            report["weights"], differing = verify.same_weights(*merged)
            report["problems"] += differing
    if not report["problems"]:
        return {k: v for k, v in report.items() if k != "problems"}
    context.progress.record(
        {"verification": report}
    )  # raises Fenced: the folder's name belongs to the job's present run
    rejected = context.paths.out_dir.with_name(f"{context.paths.out_dir.name}.rejected")
    write_json(folder / "verification.json", report)
    shutil.rmtree(rejected, ignore_errors=True)
    os.replace(folder, rejected)
    raise JobFailure(
        "export_mismatch", f"the export does not say what the adapter says: {'; '.join(report['problems'])}"
    )


def in_nf4(spec: ExportSpec) -> Callable[[Planned], bool]:
    """Which of the merged tensors are stored in 4 bits."""
    return lambda planned: spec.format == "merged_4bit" and planned.linear


def stepper(context: Context) -> Callable[[int, int], None]:
    """Report tensors done and raise when the run was asked to end."""

    def step(done: int, total: int) -> None:
        check(context.progress)
        context.progress.steps({"step": done, "total_steps": total})

    return step


@contextlib.contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """An empty folder that is removed at the end; what an attempt that was killed left in it is removed first."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sweep(out_dir: Path) -> None:
    """Remove what killed attempts at this export left beside its place, and an earlier refusal."""
    for path in [*out_dir.parent.glob(f".{out_dir.name}.*"), out_dir.with_name(f"{out_dir.name}.rejected")]:
        shutil.rmtree(path, ignore_errors=True)
