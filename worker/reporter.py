"""From the trainer to Progress and back: metrics, steps and checkpoints out; pause, cancel and stop in."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from worker.checkpoints import describe_checkpoints
from worker.model import on_gpu
from worker.outcome import Ask, Interrupted, Progress

ASKS: tuple[Ask | None, ...] = (None, "pause", "cancel", "stop")


class Reporter(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Metrics, progress and checkpoints of a LorryTrainer to Progress; pause, cancel and stop from it, at the end of the step."""

    def __init__(self, progress: Progress, trainer: Any, resumed_from: Path | None) -> None:
        self.progress, self.trainer, self.resumed_from = progress, trainer, resumed_from
        self.ended: Ask | None = None
        self.busy = 0.0  # seconds in training steps since the last logged point
        self.logged_tokens = 0
        self.began = self.step_began = time.perf_counter()
        self.first_step = 0
        self.rates: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.tokens = state.num_input_tokens_seen
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
        if self.trainer.evaluated % self.trainer.ranks.size:
            return  # of the ranks, which have a batch each, some are not here yet
        self._ask(control)
        if self.ended:
            raise Interrupted(self.ended)  # an evaluation may be long; the step before it is whole

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any) -> None:
        logs = logs or {}
        epoch = round(state.epoch or 0.0, 4)
        if "eval_loss" in logs:
            self.progress.metrics("eval", state.global_step, {"epoch": epoch, "eval_loss": logs["eval_loss"]})
        elif "loss" in logs:
            tokens = self.trainer.tokens
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
        if not self.ended:  # rank 0 hears it, and all end at the same step
            self.ended = ASKS[self.trainer.ranks.of_first(ASKS.index(self.progress.asked()))]
        if self.ended:
            self.trainer.asked = True
            control.should_save = control.should_training_stop = True
