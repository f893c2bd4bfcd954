"""What both recipes do once they have data and a model: train, save, read back, compare. Read top to bottom."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from service.specs import CptSpec, IftSpec
from worker import adapter_io, record, split_weights, verify
from worker import model as models
from worker import trainer as trainers
from worker.checkpointing import Checkpointing
from worker.checkpoints import checkpoints_in, read_pending
from worker.data import Prepared
from worker.files import folder_bytes, whole_folder
from worker.optimizer import check_optimizer
from worker.outcome import Ask, Context, Interrupted, Outcome, check
from worker.packing import choose_packing
from worker.passes import Capacity
from worker.push import push_adapter
from worker.verify_math import next_token_logprobs

PROBE_ROWS, PROBE_TOKENS = 16, 128


@dataclass
class Trained:
    """A finished training, its adapter saved: the numbers, and what the model in memory answered to one row."""

    result: dict[str, Any]
    ids: list[int]
    logprobs: torch.Tensor  # [len(ids), vocabulary]


@dataclass(frozen=True)
class Build:
    """How to make the model: called once, so that nobody else holds it when its memory is needed again."""

    model: Callable[[], Any]  # a PeftModel whose "default" adapter is trainable
    checkpointing: Checkpointing
    parent: Path | None = None  # the frozen or merged adapter that the saved one must contain, too


def fit(spec: CptSpec | IftSpec, build: Build, tokenizer: Any, data: Prepared, context: Context) -> Outcome:
    """Train on `data`, from the newest checkpoint if there is one; save; reload from the files; compare and answer.

    Returns how it ended. Raises JobFailure, Interrupted and Fenced.
    """
    trained = train_and_save(spec, build, tokenizer, data, context)
    if not isinstance(trained, Trained):
        return Outcome(trained)
    if not context.ranks.first:
        return Outcome("done")
    path, result = context.paths.out_dir, trained.result
    try:
        # Only what was read back counts.
        ask = context.progress.asked()
        if ask in ("cancel", "stop"):
            raise Interrupted(ask)
        context.progress.phase("verifying")
        gc.collect()
        result["verification"] = verify.reload_and_compare(
            path, spec.model, context.paths.base, trained.ids, trained.logprobs, tokenizer, **context.hub
        )
        failure = push_adapter(path, spec, context, result) if spec.push_to_hub else None
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)  # no row will name it
        raise
    adapter = {
        "path": str(path),
        "step": result["step"],
        "eval_loss": result["eval_loss"],
        "bytes": folder_bytes(path),
        "template": data.template.model_dump(),
        "config": adapter_io.describe(path),
    }
    return Outcome("done", result=result, adapter=adapter, failure=failure)


def train_and_save(
    spec: CptSpec | IftSpec, build: Build, tokenizer: Any, data: Prepared, context: Context
) -> Trained | Ask:
    """Train and write the adapter's folder; or what was asked of the run, after its checkpoint. Frees its memory."""
    paths, progress = context.paths, context.progress
    model = build.model()
    counts = models.count_parameters(model)
    packing = choose_packing(spec.training.packing, model)
    if not build.checkpointing.used:
        models.widen_loss_chunks()
    capacity, eval_capacity = capacities(
        spec, data, build.checkpointing.tokens, packed=packing["used"], checkpoints=context.checkpoints
    )
    probe = [row[:PROBE_TOKENS] for row in (data.eval or data.train)[:PROBE_ROWS]["input_ids"]]

    def save_adapter(folder: Path, step: int) -> None:
        trained_on = models.trained_on(model)
        about = {**context.about, "step": step, "trained_on": trained_on, "data_fingerprint": data.fingerprint}
        adapter_io.save(model, tokenizer, data.template, about, probe, folder, parent=build.parent, base=paths.base)

    def narrowed(what: str, capacity: Capacity, reason: str) -> None:
        held = f"{capacity.tokens} tokens" if capacity.packed else f"{capacity.rows} rows"
        progress.log(
            f"out of memory in {what}: from here on a pass has at most {held}; what is learnt is the same. {reason}"
        )
        progress.record({"passes": describe_passes(capacity_of)})

    capacity_of = {"train": capacity, "eval": eval_capacity}
    args = trainers.training_arguments(
        spec,
        paths.run_dir,
        context.ranks,
        has_eval=data.eval is not None,
        resuming=trainers.is_resuming(context.checkpoints),
        checkpointing=build.checkpointing.used,
    )
    trainer = trainers.LorryTrainer(
        model=model,
        processing_class=tokenizer,
        args=args,
        train_dataset=data.train,
        eval_dataset=data.eval,
        save_adapter=save_adapter,
        fence=progress.asked,
        save_total_limit=spec.training.save_total_limit,
        capacity=capacity,
        eval_capacity=eval_capacity,
        narrowed=narrowed,
        ranks=context.ranks,
        split_embeddings=split_weights.wanted(spec, args),
    )
    groups = check_optimizer(trainer, spec)
    used = str(getattr(args.optim, "value", args.optim))
    progress.record(
        {
            **counts,
            "optimizer": {"asked": spec.training.optim, "used": used, "groups": groups},
            "device": record.device(),
            "processes": context.ranks.size,
            "versions": record.versions(),
            "compute": models.compute_types(model, args),
            "gradient_checkpointing": {
                "asked": spec.training.gradient_checkpointing,
                "used": build.checkpointing.used,
                "why": build.checkpointing.why,
            },
            "packing": packing,
            "passes": describe_passes(capacity_of),
        }
    )
    check(progress)

    progress.phase("training")
    context.ranks.join((p.data for p in model.parameters() if p.requires_grad), data.fingerprint)
    progress.started()
    asked = trainers.train(trainer, spec, progress, context.checkpoints)
    if asked:
        context.ranks.leave()
        return asked
    result = {**trainers.final_losses(trainer), **counts, "tokens": trainer.tokens}
    result["data_fingerprint"] = data.fingerprint
    context.ranks.leave()
    if not context.ranks.first:
        return Trained(result, probe[0], torch.empty(0))

    progress.phase("saving")
    with whole_folder(paths.out_dir) as folder:
        trainer.save_to(folder, result["step"])
    progress.record({"peak_memory_bytes": record.peak_memory()})
    return Trained(result, probe[0], next_token_logprobs(model, probe[0]))


def capacities(
    spec: CptSpec | IftSpec, data: Prepared, most: int | None, *, packed: bool, checkpoints: Path
) -> tuple[Capacity, Capacity]:
    """What a pass may hold in training and in evaluation: as the spec asks, or what an earlier attempt found to fit.

    Packed, a pass has the tokens that the spec's batch of full windows would have, so it needs no more memory. On a CPU,
    where a packed pass is masked and not skipped, those of the batch as it is. `most`: tokens that the memory bears.
    """
    t = spec.training
    longest = spec.model.max_seq_length if models.on_gpu() else min(spec.model.max_seq_length, data.report["longest"])
    rows = {"train": int(t.per_device_train_batch_size), "eval": t.per_device_eval_batch_size}
    made = {side: Capacity(packed, n, n * longest) for side, n in rows.items()}
    if most is not None:
        made["train"].tokens = min(made["train"].tokens, most)
        made["train"].rows = max(1, min(made["train"].rows, most // min(longest, data.report["longest"])))
    present = checkpoints_in(checkpoints)
    if present:
        learnt = read_pending(present[max(present)]).get("capacity", {})
        for side, values in learnt.items():
            made[side].rows = min(made[side].rows, values["rows"])
            made[side].tokens = min(made[side].tokens, values["tokens"])
    return made["train"], made["eval"]


def describe_passes(capacity_of: dict[str, Capacity]) -> dict[str, dict[str, int]]:
    """For the record: the most that a pass holds, in rows where they are padded and in tokens where they are packed."""
    return {side: {"tokens": c.tokens} if c.packed else {"rows": c.rows} for side, c in capacity_of.items()}
