"""per_device_train_batch_size "auto": the batch of a run, chosen by the memory that its device has free."""

from __future__ import annotations

from pathlib import Path

from service.specs import CptSpec, IftSpec
from worker.memory import GIB, STEP_ROWS, NoEstimate, Plan, Shape, plan
from worker.outcome import Context


def settle_batch(spec: CptSpec | IftSpec, context: Context) -> CptSpec | IftSpec:
    """The spec with a number in place of "auto", told in the log and in the run's record; any other spec as it is.

    A pass is taken to be of rows of max_seq_length: nobody has read the data yet. Call before the model is loaded: what it
    will take must still be free. Raises JobFailure for a base without a config.
    """
    if spec.training.per_device_train_batch_size != "auto":
        return spec
    from worker.model import config_of, on_gpu

    config = config_of(context.paths.base, spec.model, **context.hub)
    free = free_bytes()
    try:
        chosen = plan(
            spec,
            Shape.of(config),
            free,
            spec.model.max_seq_length,
            device="cuda" if on_gpu() else "cpu",
            frozen_adapter_bytes=frozen_bytes(spec, context.paths.parent),
        )
    except NoEstimate as reason:
        told: dict[str, object] = {"asked": "auto", "batch": STEP_ROWS, "why": str(reason)}
        context.progress.log(f"per_device_train_batch_size auto: {STEP_ROWS} rows a pass, the default: {reason}")
        settled = with_batch(spec, STEP_ROWS, spec.training.gradient_accumulation_steps)
    else:
        told = {
            "asked": "auto",
            "batch": chosen.batch,
            "gradient_accumulation_steps": chosen.accumulation,
            "estimate_bytes": chosen.estimate.bytes,
            "free_bytes": free,
        }
        context.progress.log(sentence(chosen))
        settled = with_batch(spec, chosen.batch, chosen.accumulation)
    context.progress.record({"batch": told})
    return settled


def with_batch(spec: CptSpec | IftSpec, batch: int, accumulation: int) -> CptSpec | IftSpec:
    """The spec with these numbers."""
    values = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    return spec.model_copy(update={"training": spec.training.model_copy(update=values)})


def sentence(chosen: Plan) -> str:
    """The choice in words."""
    passes = "1 pass" if chosen.accumulation == 1 else f"{chosen.accumulation} passes"
    about = f"per_device_train_batch_size auto: {chosen.batch} rows a pass, {passes} a step, for about "
    about += f"{chosen.estimate.bytes / GIB:.1f} GiB at the peak of {chosen.free_bytes / GIB:.1f} GiB that are free"
    about += f", at most {chosen.estimate.tokens} tokens at once"
    return about if chosen.fits else f"{about}: it may not fit"


def frozen_bytes(spec: CptSpec | IftSpec, parent: Path | None) -> int:
    """Of a parent adapter that stays in memory beside the new one."""
    stacked = isinstance(spec, IftSpec) and spec.init is not None and spec.init.mode == "stack"
    return (parent / "adapter_model.safetensors").stat().st_size if stacked and parent else 0


def free_bytes() -> int:
    """Bytes free on the device that this process would train on."""
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return int(min(free, torch.cuda.get_per_process_memory_fraction() * total))  # LORRY_TRAIN_MEMORY_FRACTION
    import psutil

    return int(psutil.virtual_memory().available)
