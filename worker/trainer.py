"""The trainer both recipes use: Unsloth's, with checkpoints that are whole or absent and nothing counted twice."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, Trainer, TrainerState
from unsloth import UnslothTrainer, UnslothTrainingArguments, is_bfloat16_supported

from service.specs import CptSpec, IftSpec
from worker.checkpoints import (
    PENDING,
    STAGING,
    checkpoints_in,
    describe_checkpoints,
    read_pending,
    trainable_part,
)
from worker.files import replace_folder, write_json
from worker.model import OriginalsOffDevice, load_weights, on_gpu
from worker.optimizer import page_states, wait_less
from worker.outcome import Ask, Interrupted, Progress
from worker.passes import Capacity, collate, passes_of, take, trained_tokens
from worker.ranks import ALONE, Ranks
from worker.reporter import Reporter
from worker.split_weights import SplitWeights, embeddings_of

SaveAdapter = Callable[[Path, int], None]  # (folder, step): write the adapter as it is now
Narrowed = Callable[[str, Capacity, str], None]  # ("training" | "evaluation", what is left, the error's first line)


def training_arguments(
    spec: CptSpec | IftSpec, run_dir: Path, ranks: Ranks, *, has_eval: bool, resuming: bool, checkpointing: bool
) -> UnslothTrainingArguments:
    """TrainingArguments of a spec. The names are the same; what is added here is said why."""
    t = spec.training
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(run_dir / "tensorboard")  # transformers 5 has no argument for it
    bf16 = bool(is_bfloat16_supported()) and spec.model.dtype in ("auto", "bfloat16")
    return UnslothTrainingArguments(
        embedding_learning_rate=t.embedding_learning_rate if spec.lora.train_embeddings else None,
        output_dir=str(run_dir / "checkpoints"),
        # All rows of a step at once: LorryTrainer deals them out to the ranks and into passes itself (worker/passes.py).
        per_device_train_batch_size=t.per_device_train_batch_size * t.gradient_accumulation_steps * ranks.size,
        per_device_eval_batch_size=t.per_device_eval_batch_size,
        gradient_accumulation_steps=1,
        # transformers 5: a float below 1 is a ratio, and 1 or more a number of steps.
        warmup_steps=min(t.warmup_ratio, 0.999999),
        num_train_epochs=t.num_train_epochs,
        max_steps=t.max_steps,
        learning_rate=t.learning_rate,
        optim=t.optim,
        weight_decay=t.weight_decay,
        max_grad_norm=t.max_grad_norm,
        lr_scheduler_type=t.lr_scheduler_type,
        logging_steps=t.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # a loss that is not a number is to be seen; and looking for one waits for the GPU
        eval_strategy="steps" if has_eval else "no",
        eval_steps=t.eval_steps if has_eval else None,
        eval_on_start=has_eval and not resuming,
        save_strategy="steps",
        restore_callback_states_from_checkpoint=True,  # or early stopping would count its patience anew
        save_steps=t.save_steps,
        load_best_model_at_end=t.keeps_best,
        metric_for_best_model="eval_loss" if has_eval else None,
        greater_is_better=False if has_eval else None,
        seed=t.seed,
        data_seed=t.seed,
        bf16=bf16,
        fp16=on_gpu() and not bf16 and spec.model.dtype != "float32",
        gradient_checkpointing=checkpointing,
        prediction_loss_only=True,
        report_to=["tensorboard"] if ranks.first else [],
        disable_tqdm=True,
        remove_unused_columns=True,
        max_length=None,  # rows are cut before they come here
        packing=False,
        loss_type="nll",  # Unsloth's fused loss takes the vocabulary in chunks; TRL's own chunked loss also computes the entropy
        dataset_kwargs={"skip_prepare_dataset": True},
        dataloader_pin_memory=on_gpu(),
    )


class LorryTrainer(UnslothTrainer):  # type: ignore[misc, unused-ignore]
    """UnslothTrainer with whole checkpoints, float32 trainable weights and an evaluation that computes the loss only."""

    def __init__(
        self,
        *,
        save_adapter: SaveAdapter,
        fence: Callable[[], Any],
        save_total_limit: int,
        capacity: Capacity,
        eval_capacity: Capacity,
        narrowed: Narrowed,
        ranks: Ranks,
        split_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        self.split = SplitWeights(embeddings_of(kwargs["model"])) if split_embeddings else None
        held = self.split.low if self.split else {}
        before = {p: p.data for p in kwargs["model"].parameters() if p.requires_grad and p not in held}
        super().__init__(data_collator=collate, **kwargs)
        # TRL casts the trainable weights of a 4-bit model to bfloat16, where a step of 1e-5 on an embedding is lost to
        # rounding, and what a parent adapter has learnt beyond that type. Optimiser and weights stay in float32, as Unsloth
        # keeps them on a GPU.
        for parameter, data in before.items():
            parameter.data = data.to(parameter.device, torch.float32)
        self.capacity, self.eval_capacity, self.narrowed = capacity, eval_capacity, narrowed
        self.ranks = ranks
        self.evaluated = 0  # batches of the evaluation under way
        self.save_adapter = save_adapter
        self.fence = fence  # raises Fenced if another run has the job and writes to the same folder
        self.evaluation_due = False  # the step's evaluation was interrupted
        self.asked = False  # what stops the training was asked for: steps are left to take
        self.staging = Path(self.args.output_dir) / f"{STAGING}.{os.urandom(4).hex()}"
        self.keep = save_total_limit
        self.tokens = 0  # of all rows so far, without padding

    def create_optimizer(self, model: Any = None) -> Any:
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if self.split and fresh:
            self.split.attach(optimizer)
        if fresh:
            wait_less(optimizer)
        return optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        page_states(self.optimizer)

    def _clip_grad_norm(self, model: Any) -> Any:
        if self.split:
            return self.split.clip(model.parameters(), self.args.max_grad_norm)
        return super()._clip_grad_norm(model)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """The next step's rows and how many of their tokens are trained."""
        batches = list(islice(epoch_iterator, num_batches))
        return batches, sum(trained_tokens(batch) for batch in batches)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward for all rows of a step. Returns the mean loss of their trained tokens."""
        own = take(inputs, self.ranks.share(inputs["lengths"]))

        def compute() -> torch.Tensor:
            passes = list(passes_of(own, self.capacity, self.processing_class.pad_token_id))
            with self.ranks.own_randomness(self.args.seed + self.state.global_step):
                losses = [super(LorryTrainer, self).training_step(model, each, num_items_in_batch) for each in passes]
            if not losses:  # the last step of an epoch may have fewer rows than there are ranks
                return torch.zeros((), device=self.args.device)
            return torch.stack(losses).sum() if len(losses) > 1 else losses[0]

        loss = self._within_memory(compute, "training", self.capacity, own["lengths"], self.ranks)
        if self.ranks.size > 1:  # each has its rows' part of the mean over all of the step's tokens
            trainable = [p for p in self.model.parameters() if p.requires_grad]
            for parameter in trainable:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            self.ranks.add_up([loss, *(p.grad for p in trainable)])
        self.tokens += sum(inputs["lengths"])
        return loss

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor, None, None]:
        """The mean loss of a batch's trained tokens, in as many passes as the memory wants; 0 for another rank's batch."""
        self.evaluated += 1
        if (self.evaluated - 1) % self.ranks.size != self.ranks.rank:
            return torch.zeros((), device=self.args.device), None, None

        def compute() -> torch.Tensor:
            passes = list(passes_of(inputs, self.eval_capacity, self.processing_class.pad_token_id))
            counts = [trained_tokens(each) for each in passes]
            losses = [super(LorryTrainer, self).prediction_step(model, each, True, ignore_keys)[0] for each in passes]
            if len(losses) == 1:
                return losses[0]
            return sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)

        return self._within_memory(compute, "evaluation", self.eval_capacity, inputs["lengths"], ALONE), None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate, each rank every size-th batch: the mean over all batches is the sum of the ranks' means."""
        self.evaluated = 0
        output = super().evaluation_loop(*args, **kwargs)
        for name in [name for name in output.metrics if name.endswith("_loss")]:
            output.metrics[name] = self.ranks.total(output.metrics[name])
        return output

    def _within_memory(
        self, compute: Callable[[], torch.Tensor], what: str, capacity: Capacity, lengths: list[int], ranks: Ranks
    ) -> torch.Tensor:
        """Run `compute`; where the GPU's memory does not bear it, halve the passes and run it from its start.

        A step begins without gradients, so that one begun anew counts nothing twice; `ranks` begin it anew together.
        Raises torch.OutOfMemoryError if one row alone is too much.
        """
        while True:
            reason = ""
            try:
                result = compute()
            except torch.OutOfMemoryError as error:
                reason = str(error).splitlines()[0]
                if not capacity.halve(lengths):
                    raise
            if not ranks.anyone(bool(reason)):
                return result
            reason = next(filter(None, ranks.gather(reason)))
            capacity.rows, capacity.tokens = ranks.least([capacity.rows, capacity.tokens])
            # Out here the error is gone, and with it the frames that held the pass's tensors.
            self.model.zero_grad(set_to_none=True)
            gc.collect()
            if on_gpu():
                torch.cuda.empty_cache()
            self.narrowed(what, capacity, reason)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        # Past TRL, which would also compute entropy and accuracy over the whole vocabulary: that costs more than the loss.
        inputs["use_cache"] = False
        return Trainer.compute_loss(self, model, inputs, *args, **kwargs)

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # nobody reads it, and it counts all parameters anew at every step

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        self.save_to(Path(output_dir or self.args.output_dir), self.state.global_step)

    def save_to(self, folder: Path, step: int) -> None:
        """Write the adapter as it is now, in float32 whatever it is held in."""
        with self.split.joined() if self.split else nullcontext():
            self.save_adapter(folder, step)

    def load(self, folder: Path) -> None:
        """Load the trainable matrices, embeddings included; every tensor must find its place."""
        with self.split.joined(take_back=True) if self.split else nullcontext():
            load_weights(self.model, trainable_part(folder))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write the checkpoint beside its place, sync, rename, then delete the oldest beyond the limit."""
        if self.ranks.first:
            self._write_checkpoint(model, trial)
        self.ranks.wait()  # who reads it next must find it whole

    def _write_checkpoint(self, model: Any, trial: Any) -> None:
        final_root = self.args.output_dir
        name = f"checkpoint-{self.state.global_step}"
        target, staging_root = Path(final_root) / name, self.staging
        shutil.rmtree(staging_root, ignore_errors=True)
        self.state.num_input_tokens_seen = self.tokens
        self._point_to_best(target)
        # The base class writes below args.output_dir and rotates there; with one checkpoint in it, it rotates nothing.
        self.args.output_dir = str(staging_root)
        best = self.state.best_model_checkpoint
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.output_dir = final_root
        self.state.best_model_checkpoint = best
        self.state.save_to_json(str(staging_root / name / "trainer_state.json"))
        # The running mean of the loss since the last logged point: without it the first point after a resume would
        # average over fewer steps than an uninterrupted run's.
        pending = {
            "loss_sum": self._tr_loss.item(),
            "last_logged_step": self._globalstep_last_logged,
            "evaluation_due": self.evaluation_due,
            "finished": self.finished,
            "gradient_checkpointing": self.args.gradient_checkpointing,
            "capacity": {"train": vars(self.capacity), "eval": vars(self.eval_capacity)},
        }
        write_json(staging_root / name / PENDING, pending)
        self.fence()
        replace_folder(staging_root / name, target)
        shutil.rmtree(staging_root, ignore_errors=True)
        steps = sorted(checkpoints_in(Path(final_root)))
        for step in [s for s in steps if s not in (self.state.best_global_step, steps[-1])][
            : max(0, len(steps) - self.keep)
        ]:
            shutil.rmtree(Path(final_root) / f"checkpoint-{step}")

    @property
    def finished(self) -> bool:
        """Whether no step is left: all were taken, or early stopping ended it."""
        stopped = self.control.should_training_stop and not self.asked
        return bool(self.state.global_step >= self.state.max_steps or stopped)

    def take_up(self, checkpoint: Path, *, evaluate: bool) -> None:
        """Stand where a finished training stood. trainer.train() would take one more step, whatever max_steps says."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        self.tokens = self.state.num_input_tokens_seen
        if evaluate:
            self._evaluate(None, None, skip_scheduler=True)
        if self.args.load_best_model_at_end and self.state.best_global_step:
            self._load_best_model()

    def _point_to_best(self, newest: Path) -> None:
        """Set the best checkpoint's folder in the state: `newest`, about to be there, or one that is."""
        best = newest.with_name(f"checkpoint-{self.state.best_global_step}")
        if self.state.best_global_step and (best == newest or best.is_dir()):
            self.state.best_model_checkpoint = str(best)

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> Any:
        metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        if skip_scheduler and self.state.global_step:
            # The evaluation that a pause interrupted, made up for at the start of the resumed run.
            self.evaluation_due = False
            self._determine_best_metric(metrics, trial)
            self._point_to_best(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")
        return metrics

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.load(Path(resume_from_checkpoint))

    def restore_pending_loss(self, checkpoint: Path) -> None:
        """Go on with the loss summed since the last logged point before `checkpoint`."""
        pending = read_pending(checkpoint)
        self._tr_loss.fill_(pending["loss_sum"])
        self._globalstep_last_logged = pending["last_logged_step"]

    def _load_best_model(self) -> None:
        # By its step: a folder restored from a backup may lie elsewhere than the state in its checkpoints says.
        best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
        self.load(best)


def train(trainer: LorryTrainer, spec: CptSpec | IftSpec, progress: Progress, checkpoints: Path) -> Ask | None:
    """Train from the newest whole checkpoint, or from the start. Returns what ended it early, after a checkpoint, or None."""
    for leftover in checkpoints.glob(f"{STAGING}.*") if trainer.ranks.first else ():
        shutil.rmtree(leftover, ignore_errors=True)
    if spec.training.early_stopping_patience:
        trainer.add_callback(EarlyStoppingCallback(spec.training.early_stopping_patience))
    present = checkpoints_in(checkpoints)
    last = max(present, default=None)
    trainer.add_callback(OriginalsOffDevice())
    reporter = Reporter(progress, trainer, present[last] if last is not None else None)
    trainer.add_callback(reporter)
    if last is not None:
        progress.checkpoints(describe_checkpoints(checkpoints))
        progress.resumed(last)
        pending = read_pending(present[last])
        trainer.args.eval_on_start = pending["evaluation_due"]
    try:
        if last is not None and pending.get("finished"):  # the run died after its last step: while saving, verifying, …
            trainer.take_up(present[last], evaluate=pending["evaluation_due"])
            state = trainer.state
            steps = {"step": state.global_step, "total_steps": state.max_steps, "epoch": round(state.epoch or 0.0, 4)}
            progress.steps({**steps, "tokens": trainer.tokens})
        else:
            trainer.train(resume_from_checkpoint=str(present[last]) if last is not None else None)
    except Interrupted:
        trainer.evaluation_due = True
        step = trainer.state.global_step
        if trainer.ranks.of_first(step > 0 and step not in checkpoints_in(checkpoints)):
            trainer._save_checkpoint(trainer.model, None)
            reporter.on_save(trainer.args, trainer.state, trainer.control)
    return reporter.ended


def final_losses(trainer: LorryTrainer) -> dict[str, Any]:
    """Evaluation loss at the start and of what was kept, the last training loss, and the steps they belong to."""
    state = trainer.state
    evals = {h["step"]: h["eval_loss"] for h in state.log_history if "eval_loss" in h}
    losses = [h for h in state.log_history if "loss" in h]
    kept = (
        state.best_global_step if trainer.args.load_best_model_at_end and state.best_global_step else state.global_step
    )
    if evals and kept not in evals:
        evals[kept] = trainer.evaluate()["eval_loss"]
    return {
        "step": kept,
        "steps_trained": state.global_step,
        "train_loss": losses[-1]["loss"] if losses else None,
        "eval_loss_start": evals.get(0),
        "eval_loss": evals.get(kept),
        "best_step": state.best_global_step,
        "stopped_early": state.global_step < state.max_steps,
    }


def is_resuming(checkpoints: Path) -> bool:
    return bool(checkpoints_in(checkpoints))
