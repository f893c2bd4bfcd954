"""The trainer both recipes use: Unsloth's, with checkpoints that are whole or absent and nothing counted twice."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from unsloth import UnslothTrainer, UnslothTrainingArguments, is_bfloat16_supported

from service.errors import JobFailure
from service.specs import CptSpec, IftSpec
from worker.files import folder_bytes, replace_folder, write_json
from worker.model import load_weights, on_gpu
from worker.outcome import Ask, Interrupted, Progress

PENDING, STAGING = "lorry_trainer.json", ".staging"
SaveAdapter = Callable[[Path, int], None]  # (folder, step): write the adapter as it is now


def training_arguments(
    spec: CptSpec | IftSpec, run_dir: Path, *, has_eval: bool, resuming: bool, checkpointing: bool
) -> UnslothTrainingArguments:
    """TrainingArguments of a spec. The names are the same; what is added here is said why."""
    t = spec.training
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(run_dir / "tensorboard")  # transformers 5 has no argument for it
    bf16 = bool(is_bfloat16_supported()) and spec.model.dtype in ("auto", "bfloat16")
    return UnslothTrainingArguments(
        embedding_learning_rate=t.embedding_learning_rate if spec.lora.train_embeddings else None,
        output_dir=str(run_dir / "checkpoints"),
        per_device_train_batch_size=t.per_device_train_batch_size,
        per_device_eval_batch_size=t.per_device_eval_batch_size,
        gradient_accumulation_steps=t.gradient_accumulation_steps,
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
        report_to=["tensorboard"],
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
        self, *, save_adapter: SaveAdapter, fence: Callable[[], Any], save_total_limit: int, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.save_adapter = save_adapter
        self.fence = fence  # raises Fenced if another run has the job and writes to the same folder
        self.evaluation_due = False  # the step's evaluation was interrupted
        self.asked = False  # what stops the training was asked for: steps are left to take
        self.staging = Path(self.args.output_dir) / f"{STAGING}.{os.urandom(4).hex()}"
        self.keep = save_total_limit
        self.tokens = torch.zeros((), dtype=torch.long, device=self.args.device)  # on the device: no sync per step
        # TRL casts the trainable weights of a 4-bit model to bfloat16, where a step of 1e-5 on an embedding is lost to
        # rounding. Optimiser and weights stay in float32, as Unsloth keeps them on a GPU.
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        mask = inputs.get("attention_mask")
        self.tokens += mask.sum().to(self.tokens.device) if mask is not None else inputs["input_ids"].numel()
        return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)
        # TRL would also compute entropy and accuracy over the whole vocabulary, which costs more than the loss.
        inputs["use_cache"] = False
        return Trainer.compute_loss(self, model, inputs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        self.save_adapter(Path(output_dir or self.args.output_dir), self.state.global_step)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write the checkpoint beside its place, sync, rename, then delete the oldest beyond the limit."""
        final_root = self.args.output_dir
        name = f"checkpoint-{self.state.global_step}"
        target, staging_root = Path(final_root) / name, self.staging
        shutil.rmtree(staging_root, ignore_errors=True)
        self.state.num_input_tokens_seen = int(self.tokens)
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
        self.tokens.fill_(self.state.num_input_tokens_seen)
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
        """Load the trainable matrices, embeddings included; every tensor must find its place."""
        load_weights(self.model, trainable_part(Path(resume_from_checkpoint)))

    def restore_pending_loss(self, checkpoint: Path) -> None:
        """Go on with the loss summed since the last logged point before `checkpoint`."""
        pending = read_pending(checkpoint)
        self._tr_loss.fill_(pending["loss_sum"])
        self._globalstep_last_logged = pending["last_logged_step"]

    def _load_best_model(self) -> None:
        # By its step: a folder restored from a backup may lie elsewhere than the state in its checkpoints says.
        best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
        load_weights(self.model, trainable_part(best))


def read_pending(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint left for the resumed run: loss_sum, last_logged_step, evaluation_due, finished."""
    pending: dict[str, Any] = json.loads((checkpoint / PENDING).read_text())
    return pending


def trainable_part(folder: Path) -> Path:
    """Where a checkpoint keeps what a resumed run loads: a stacked adapter's folder holds the sum, this the second half."""
    part = folder / "trainable"
    return part if part.is_dir() else folder


def checkpoints_in(folder: Path) -> dict[int, Path]:
    """Whole checkpoints by step; a folder gets its name only when all is in it."""
    if not folder.is_dir():
        return {}
    named = {p.name.removeprefix("checkpoint-"): p for p in folder.iterdir() if p.name.startswith("checkpoint-")}
    return {int(step): path for step, path in named.items() if step.isdecimal()}


def describe_checkpoints(folder: Path) -> dict[int, dict[str, Any]]:
    """path, loss, eval_loss and bytes of each checkpoint, from its own trainer_state.json."""
    out = {}
    for step, path in checkpoints_in(folder).items():
        history = json.loads((path / "trainer_state.json").read_text())["log_history"]
        losses = [h["loss"] for h in history if "loss" in h]
        evals = [h["eval_loss"] for h in history if "eval_loss" in h and h["step"] == step]
        out[step] = {
            "path": str(path),
            "loss": losses[-1] if losses else None,
            "eval_loss": evals[-1] if evals else None,
            "bytes": folder_bytes(path),
        }
    return out


class Reporter(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Metrics, progress and checkpoints to Progress; pause, cancel and stop from it, at the end of the step."""

    def __init__(self, progress: Progress, trainer: LorryTrainer, resumed_from: Path | None) -> None:
        self.progress, self.trainer, self.resumed_from = progress, trainer, resumed_from
        self.ended: Ask | None = None
        self.busy = 0.0  # seconds in training steps since the last logged point
        self.logged_tokens = 0
        self.began = self.step_began = time.perf_counter()
        self.first_step = 0
        self.rates: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.tokens.fill_(state.num_input_tokens_seen)
        self.logged_tokens = state.num_input_tokens_seen
        self.first_step = state.global_step
        self.began = time.perf_counter()
        if self.resumed_from:
            self.trainer.restore_pending_loss(self.resumed_from)

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.step_began = time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # The rates this step is taken with; after it the scheduler has already set the next step's.
        groups = self.trainer.optimizer.param_groups
        self.rates = {
            f"{'embedding_' if g.get('lorry_embeddings') else ''}learning_rate": g["lr"] for g in groups if g["params"]
        }

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        now = time.perf_counter()
        self.busy += now - self.step_began
        self._ask(control)
        if state.global_step >= state.max_steps:
            control.should_log = True  # the last point of the curve, whatever logging_steps is
        per_step = (now - self.began) / max(1, state.global_step - self.first_step)
        self.progress.steps(
            {
                "step": state.global_step,
                "total_steps": state.max_steps,
                "epoch": round(state.epoch or 0.0, 4),
                "eta_seconds": round(per_step * (state.max_steps - state.global_step), 1),
            }
        )

    def on_prediction_step(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._ask(control)
        if self.ended:
            raise Interrupted(self.ended)  # an evaluation may be long; the step before it is whole

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any) -> None:
        logs = logs or {}
        epoch = round(state.epoch or 0.0, 4)
        if "eval_loss" in logs:
            self.progress.metrics("eval", state.global_step, {"epoch": epoch, "eval_loss": logs["eval_loss"]})
        elif "loss" in logs:
            tokens = int(self.trainer.tokens)
            speed = round((tokens - self.logged_tokens) / self.busy, 1) if self.busy else 0.0
            point = {
                "epoch": epoch,
                "loss": logs["loss"],
                "grad_norm": logs.get("grad_norm"),
                **self.rates,
                "tokens": tokens,
                "tokens_per_second": speed,
            }
            if on_gpu():
                point["memory_bytes"] = torch.cuda.max_memory_allocated()
            self.progress.metrics("train", state.global_step, point)
            self.progress.steps(
                {
                    "step": state.global_step,
                    "total_steps": state.max_steps,
                    "epoch": epoch,
                    "tokens": tokens,
                    "tokens_per_second": speed,
                }
            )
            self.logged_tokens, self.busy = tokens, 0.0

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.progress.checkpoints(describe_checkpoints(Path(args.output_dir)))

    def _ask(self, control: TrainerControl) -> None:
        self.ended = self.ended or self.progress.asked()
        if self.ended:
            self.trainer.asked = True
            control.should_save = control.should_training_stop = True


def check_packing(spec: CptSpec | IftSpec) -> None:
    """Raise JobFailure if packing was demanded where no exact kernel is wired up; 'auto' falls back to padded rows."""
    if spec.training.packing is True:
        raise JobFailure(
            "unsupported",
            "training.packing: no attention kernel here keeps packed rows apart exactly; use 'auto' or false",
        )


def train(trainer: LorryTrainer, spec: CptSpec | IftSpec, progress: Progress, checkpoints: Path) -> Ask | None:
    """Train from the newest whole checkpoint, or from the start. Returns what ended it early, after a checkpoint, or None."""
    for leftover in checkpoints.glob(f"{STAGING}.*"):
        shutil.rmtree(leftover, ignore_errors=True)
    if spec.training.early_stopping_patience:
        trainer.add_callback(EarlyStoppingCallback(spec.training.early_stopping_patience))
    present = checkpoints_in(checkpoints)
    last = max(present, default=None)
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
            progress.steps({**steps, "tokens": int(trainer.tokens)})
        else:
            trainer.train(resume_from_checkpoint=str(present[last]) if last is not None else None)
    except Interrupted:
        trainer.evaluation_due = True
        if trainer.state.global_step and trainer.state.global_step not in checkpoints_in(checkpoints):
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
