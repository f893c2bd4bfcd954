"""Instruction fine-tuning: chats or question-answer pairs, from the base or from an adapter."""

from __future__ import annotations

from typing import Any

from service.errors import JobFailure
from service.specs import IftSpec
from worker import model as models
from worker.auto_batch import free_bytes, frozen_bytes
from worker.base_model import load_tokenizer
from worker.checkpointing import choose, of_checkpoints
from worker.data import TokenCache, prepare
from worker.export.merge import merge_into_base
from worker.fit import Build, fit
from worker.outcome import Context, Outcome, check


def run(spec: IftSpec, context: Context) -> Outcome:
    """Train the adapter of an ift spec, or go on from the run folder's newest checkpoint.

    Raises JobFailure (bad data, model, spec or init; nothing was trained), Interrupted and Fenced.
    """
    progress, paths = context.progress, context.paths
    if spec.init and paths.parent is None:
        raise JobFailure("adapter_not_found", f"init.adapter: no adapter {spec.init.adapter}")

    # Data first: a bad row must not cost a model's load.
    progress.phase("data")
    tokenizer = load_tokenizer(paths.base, spec.model, **context.hub)
    kept = TokenCache.of(context.settings)
    data = prepare(spec, tokenizer, file=paths.file, eval_file=paths.eval_file, token=context.token, kept=kept)
    progress.record(data.record)
    progress.log(data.said)
    check(progress)

    progress.phase("model")
    config = models.config_of(paths.base, spec.model, **context.hub)
    before = of_checkpoints(context.checkpoints)
    seed, init, parent = spec.training.seed, spec.init, paths.parent
    choice = choose(
        spec, config, data.report["longest"], free_bytes(), gpu=models.on_gpu(), before=before,
        frozen_adapter_bytes=frozen_bytes(spec, parent),
    )  # fmt: skip
    checkpointing = choice.used

    def build() -> Any:
        base = models.load_base(spec.model, paths.base, checkpointing=checkpointing, **context.hub)
        if init is None or parent is None:
            return models.add_lora(base, spec.lora, seed=seed, checkpointing=checkpointing)
        if init.mode == "stack":  # the adapter stays as it is, a second one learns on top of it
            return models.stack_on(base, parent, spec.lora, seed=seed, checkpointing=checkpointing)
        if init.mode == "merge":  # the adapter goes into the weights, a new one learns on those
            merged = merge_into_base(base, parent)
            return models.add_lora(merged, spec.lora, seed=seed, checkpointing=checkpointing)
        model = models.add_lora(base, spec.lora, seed=seed, checkpointing=checkpointing)
        models.continue_from(model, parent, spec.lora)  # continue: the adapter's own matrices are trained on
        return model

    contained = parent if init and init.mode in ("stack", "merge") else None
    return fit(spec, Build(build, choice, contained), tokenizer, data, context)
