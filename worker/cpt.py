"""Continued pre-training: raw text in windows, LoRA on the projections, embeddings at their own rate."""

from __future__ import annotations

from typing import Any

from service.specs import CptSpec
from worker import model as models
from worker.auto_batch import free_bytes
from worker.base_model import load_tokenizer
from worker.checkpointing import choose, of_checkpoints
from worker.data import TokenCache, prepare
from worker.fit import Build, fit
from worker.outcome import Context, Outcome, check


def run(spec: CptSpec, context: Context) -> Outcome:
    """Train the adapter of a cpt spec, or go on from the run folder's newest checkpoint.

    Raises JobFailure (bad data, model or spec; nothing was trained), Interrupted and Fenced.
    """
    progress, paths = context.progress, context.paths

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
    choice = choose(spec, config, data.report["longest"], free_bytes(), gpu=models.on_gpu(), before=before)
    checkpointing = choice.used

    def build() -> Any:
        base = models.load_base(spec.model, paths.base, checkpointing=checkpointing, **context.hub)
        return models.add_lora(base, spec.lora, seed=spec.training.seed, checkpointing=checkpointing)

    return fit(spec, Build(build, choice), tokenizer, data, context)
