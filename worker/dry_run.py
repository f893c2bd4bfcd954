"""What a job would do, without doing it: `python -m worker.dry_run`, a child of the API (service/jobs/dry_run.py).

One request as JSON on stdin, one report as JSON on stdout, the hub token in HF_TOKEN. No database, no weights loaded; data
is read and checked by the code that a job's is, so that what it says is what the job will say. What it leaves is what is
kept anyway: the hub's cache, the caches of an object store and of tokenised data, the unpacked built-in base.
"""

from __future__ import annotations

import ctypes
import json
import logging
import math
import os
import shutil
import signal
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.errors import JobFailure
from service.logs import hide, redact
from service.settings import Settings
from service.specs import CptSpec, ExportSpec, IftSpec, parse_spec
from service.storage import open_storage
from worker import memory
from worker.auto_batch import with_batch
from worker.budget import Budget, budget_of
from worker.checkpointing import choose
from worker.shape import NoEstimate, Shape

log = logging.getLogger("lorry.dry_run")
FILES_BYTES = 64 * 2**20  # tokenizers, templates, logs and the file system's own, beside weights and states


@dataclass(frozen=True)
class Request:
    """What the API knows of a job: the admitted spec, and where in the data root the things it names lie."""

    spec: CptSpec | IftSpec | ExportSpec
    settings: Settings
    base: str
    file: str | None
    eval_file: str | None
    parent: str | None
    awaits: str | None  # the adapter that a job in `after` will make: it has no files yet
    device: dict[str, Any] | None  # of the newest run on this base, wherever it was


def run(request: Request, token: str | None) -> dict[str, Any]:
    """The report of a request. What is wrong with the job is in its `error`; nothing is raised for that."""
    report: dict[str, Any] = {"error": None}
    with ExitStack() as held:
        try:
            if isinstance(request.spec, ExportSpec):
                from worker.dry_export import export_report

                report |= export_report(request, token, held)
            else:
                _training(request.spec, request, token, held, report)
        except Exception as error:
            from worker.tasks import classify

            failure = classify(error)
            if failure.code == "internal_error":
                log.exception("the dry run failed")
            report["error"] = {**failure.body(), "message": redact(failure.message)}
    return report


def _training(
    spec: CptSpec | IftSpec, request: Request, token: str | None, held: ExitStack, report: dict[str, Any]
) -> None:
    """Fill in the report of a training as far as it gets. Raises JobFailure where the job would."""
    from worker.base_model import load_tokenizer, resolve
    from worker.data import TokenCache, prepare

    settings = request.settings
    base = resolve(request.base, settings)
    hub: dict[str, Any] = {"token": token, "trust_remote_code": settings.trust_remote_code}
    config = _config(base, spec, hub)  # before the data: it costs little and the rest needs it
    file = use(request, held, request.file, "invalid_data", "dataset.file_id: the file's bytes are gone")
    eval_file = use(request, held, request.eval_file, "invalid_data", "dataset.eval_file_id: the file's bytes are gone")
    parent = use(request, held, request.parent, "adapter_not_found", "the files of its adapter are gone")
    tokenizer = load_tokenizer(base, spec.model, **hub)
    data = prepare(spec, tokenizer, file=file, eval_file=eval_file, token=token, kept=TokenCache.of(settings))
    report["data"] = {**data.report, "fingerprint": data.fingerprint}

    # A parent's matrices that stay beside the new ones: frozen in memory with 'stack', in the adapter with 'merge', too.
    mode = spec.init.mode if isinstance(spec, IftSpec) and spec.init else None
    beside = parent / "adapter_model.safetensors" if parent and mode in ("stack", "merge") else None
    contained = beside.stat().st_size if beside else 0
    frozen = contained if mode == "stack" else 0
    budget = budget_of(spec.resources.gpus, request.device, settings.train_memory_fraction)
    try:
        shape = Shape.of(config)
        if missing := shape.missing(spec.lora.target_modules):
            there = ", ".join(sorted([*shape.projections, "embed_tokens", "lm_head"]))
            raise JobFailure(
                "invalid_spec", f"lora.target_modules: no module named {', '.join(missing)}; the model has {there}"
            )
        spec = _settled(spec, shape, budget, frozen)
        batch, accumulation = int(spec.training.per_device_train_batch_size), spec.training.gradient_accumulation_steps
        found = largest_pass(spec, config, shape, data.report["longest"], budget, frozen)
    except NoEstimate as reason:
        report["memory"] = {**budget.report(), "why": str(reason)}
        rows = spec.training.per_device_train_batch_size
        batch = memory.STEP_ROWS if rows == "auto" else rows
        report["steps"] = _steps(spec, batch, spec.training.gradient_accumulation_steps, data.report)
        return
    report["steps"] = _steps(spec, batch, accumulation, data.report)
    report["parameters"] = {"trainable": found.trainable, "total": shape.parameters + found.trainable}
    report["memory"] = _memory(found, budget)
    report["disk"] = _disk(spec, settings, found, report["steps"]["total"], contained)


def _settled(spec: CptSpec | IftSpec, shape: Shape, budget: Budget, frozen: int) -> CptSpec | IftSpec:
    """With a number in place of a batch of "auto", as worker.auto_batch takes it: for rows of max_seq_length.

    The default where nobody knows the device. Raises NoEstimate.
    """
    if spec.training.per_device_train_batch_size != "auto":
        return spec
    if budget.free_bytes is None:
        return with_batch(spec, memory.STEP_ROWS, spec.training.gradient_accumulation_steps)
    window = spec.model.max_seq_length
    chosen = memory.plan(spec, shape, budget.room, window, device=budget.device, frozen_adapter_bytes=frozen)
    return with_batch(spec, chosen.batch, chosen.accumulation)


def largest_pass(
    spec: CptSpec | IftSpec, config: Any, shape: Shape, longest: int, budget: Budget, frozen: int
) -> memory.Estimate:
    """The estimate of the largest pass that worker.fit.capacities allows and that rows of `longest` tokens may fill.

    Raises NoEstimate.
    """
    gpu, rows = budget.device == "cuda", int(spec.training.per_device_train_batch_size)
    choice = choose(spec, config, longest, budget.room, gpu=gpu, frozen_adapter_bytes=frozen)
    if gpu and spec.training.packing is not False:
        tokens = min(rows * spec.model.max_seq_length, memory.rows_per_step(spec) * longest)
        tokens = max(longest, min(tokens, choice.tokens or tokens))
    else:
        tokens = longest * max(1, min(rows, choice.tokens // longest if choice.tokens else rows))
    return memory.estimate(
        spec, shape, tokens, device=budget.device, checkpointing=choice.used, frozen_adapter_bytes=frozen
    )


def _config(base: str, spec: CptSpec | IftSpec, hub: dict[str, Any]) -> Any:
    """The base's configuration, through transformers alone. Raises JobFailure("model_not_found")."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(base, revision=spec.model.revision, **hub)
    except (OSError, ValueError) as error:
        raise JobFailure("model_not_found", f"model {spec.model.name}: {str(error).splitlines()[0]}") from error


def use(request: Request, held: ExitStack, where: str | None, code: str, gone: str) -> Path | None:
    """A thing of the data root on this machine until the report is made, as worker.workspace has it for a run.

    Raises JobFailure and StorageUnavailable.
    """
    if where is None:
        return None
    try:
        return held.enter_context(open_storage(request.settings).using(where))
    except FileNotFoundError as error:
        raise JobFailure(code, f"{gone}: {error}") from error


def _steps(spec: CptSpec | IftSpec, batch: int, accumulation: int, data: dict[str, Any]) -> dict[str, Any]:
    """Steps as transformers counts them: the last one of an epoch may have fewer rows. `tokens` without padding."""
    training = spec.training
    rows = batch * accumulation * max(1, spec.resources.gpus or 1)
    per_epoch = max(1, math.ceil(data["train_rows"] / rows))
    total = training.max_steps if training.max_steps > 0 else math.ceil(training.num_train_epochs * per_epoch)
    epochs = total / per_epoch
    return {
        "rows_per_step": rows,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "per_epoch": per_epoch,
        "total": total,
        "epochs": round(epochs, 4),
        "tokens": round(data["train_tokens"] * epochs),
    }


def _memory(found: memory.Estimate, budget: Budget) -> dict[str, Any]:
    return {
        **budget.report(),
        "peak_bytes": found.bytes,
        "context_bytes": found.context_bytes,
        "parts": found.parts,
        "phase": found.phase,
        "tokens_per_pass": found.tokens,
        "fits": None if budget.free_bytes is None else found.fits(budget.room),
    }


def _disk(
    spec: CptSpec | IftSpec, settings: Settings, found: memory.Estimate, steps: int, contained: int
) -> dict[str, Any]:
    """What a run will have on the data folder's disk at its fullest: checkpoints, one more being written, the adapter."""
    adapter = memory.TRAINED_BYTES * found.trainable + contained
    checkpoint = adapter + found.parts["optimizer"]
    count = min(spec.training.save_total_limit, math.ceil(steps / spec.training.save_steps))
    needed = checkpoint * (count + 1) + adapter + FILES_BYTES
    return {**disk_of(settings, needed), "adapter_bytes": adapter, "checkpoint_bytes": checkpoint, "checkpoints": count}


def disk_of(settings: Settings, needed: int) -> dict[str, Any]:
    """Needed against free bytes on the disk of the data folder, or of the one above it that exists."""
    folder = settings.data_dir.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    return {"needed_bytes": needed, "free_bytes": free, "fits": needed <= free}


def read_request(text: str) -> Request:
    """The request that the API wrote."""
    given = json.loads(text)
    values = given.pop("settings")
    for name in ("data_dir", "llama_cpp_dir"):
        values[name] = Path(values[name]) if values[name] is not None else None
    # As the API has them: not all of its settings are here, so nothing is checked or read from the environment again.
    settings = Settings.model_construct(**values)
    return Request(spec=parse_spec(given.pop("spec")), settings=settings, **given)


def die_with_parent() -> None:
    """Have the kernel end this process when the API dies; the API itself kills it when its client leaves."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def main() -> None:
    """Read, report, end."""
    die_with_parent()
    out = os.dup(1)
    os.dup2(2, 1)  # what libraries print must not come between
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    request = read_request(sys.stdin.read())
    token = os.environ.get("HF_TOKEN") or None
    hide(token)
    if isinstance(request.spec, ExportSpec):
        os.environ["HF_HUB_OFFLINE"] = "1"  # a base that is not here is not fetched for a look at it
    from worker.tasks import prepare_process

    prepare_process(request.settings)
    report = run(request, token)
    with os.fdopen(out, "w", encoding="utf-8") as stream:
        json.dump(report, stream)


if __name__ == "__main__":
    main()
