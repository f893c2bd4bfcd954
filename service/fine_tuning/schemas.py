"""OpenAI's fine-tuning objects: what comes in, and jobs, events and checkpoints in its shapes."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from service.models import CheckpointRow, EventRow, JobRow
from service.spec_fields import Metadata
from service.specs import IftSpec

# What "auto" stands for. Three passes are what small instruction sets want; 8 rows a step are the native "auto", which
# divides them into as many passes as the device's memory asks for.
AUTO_EPOCHS, AUTO_BATCH, BASE_LEARNING_RATE = 3, 8, 2e-4
_SUFFIX = re.compile(r"[A-Za-z0-9._-]{1,40}")


def check_suffix(suffix: str) -> str:
    """Accept what can be part of an adapter's name. Raises ValueError."""
    if not _SUFFIX.fullmatch(suffix):
        raise ValueError("1 to 40 letters, digits, '.', '_' or '-': it becomes part of the model's name")
    return suffix


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Hyperparameters(Body):
    n_epochs: Literal["auto"] | Annotated[int, Field(ge=1, le=50)] = Field(
        "auto", description=f"Passes over the data; auto is {AUTO_EPOCHS}."
    )
    batch_size: Literal["auto"] | Annotated[int, Field(ge=1, le=4096)] = Field(
        "auto", description=f"Rows per optimiser step; auto is {AUTO_BATCH}, in as many passes as the memory asks for."
    )
    learning_rate_multiplier: Literal["auto"] | Annotated[float, Field(ge=1e-6, le=1000)] = Field(
        "auto", description=f"Times {BASE_LEARNING_RATE:g}; auto is 1."
    )


class Supervised(Body):
    hyperparameters: Hyperparameters = Field(default_factory=Hyperparameters, description="Hyperparameters.")


class Method(Body):
    type: Literal["supervised"] = Field(description="Only 'supervised' is served.")
    supervised: Supervised = Field(default_factory=Supervised, description="Its settings.")


class FineTuningRequest(Body):
    """OpenAI's request. What cannot be honoured is refused, not ignored."""

    model: str = Field(min_length=1, description="A base model, or an adapter's name (or name@step) to train on from.")
    training_file: str = Field(description="Id of an upload whose rows have `messages`.")
    validation_file: str | None = Field(None, description="Id of an upload to evaluate on.")
    suffix: Annotated[str, AfterValidator(check_suffix)] | None = Field(
        None, description="Part of the name of the model that is made."
    )
    seed: int | None = Field(None, ge=0, le=2**32 - 1, description="Seed; default 3407.")
    method: Method | None = Field(None, description="How to train.")
    hyperparameters: Hyperparameters | None = Field(None, description="As method.supervised.hyperparameters; older.")
    metadata: Metadata | None = Field(None, description="Up to 16 pairs of your own.")
    integrations: list[Any] | None = Field(None, max_length=0, description="None is served.")

    @model_validator(mode="after")
    def _check(self) -> FineTuningRequest:
        if self.method is not None and self.hyperparameters is not None:
            raise ValueError("hyperparameters: method.supervised.hyperparameters has them; leave one of the two out")
        return self

    @property
    def wanted(self) -> Hyperparameters:
        return self.method.supervised.hyperparameters if self.method else self.hyperparameters or Hyperparameters()


def spec(body: FineTuningRequest, *, name: str, base: str, parent: str | None) -> IftSpec:
    """The native spec of a request, for a model of that name. `parent` is the adapter that `model` names, if it does."""
    wanted = body.wanted
    batch = AUTO_BATCH if wanted.batch_size == "auto" else wanted.batch_size
    rate = 1.0 if wanted.learning_rate_multiplier == "auto" else wanted.learning_rate_multiplier
    # A batch is one pass if it fits the native default, else several passes of the largest part that divides it.
    rows = next(n for n in range(min(batch, AUTO_BATCH), 0, -1) if batch % n == 0)
    training: dict[str, Any] = {
        "num_train_epochs": AUTO_EPOCHS if wanted.n_epochs == "auto" else wanted.n_epochs,
        "learning_rate": min(1.0, BASE_LEARNING_RATE * rate),
        "train_on_responses_only": True,
        "logging_steps": 1,
        "eval_steps": 50,
        "save_steps": 50,
        "per_device_train_batch_size": "auto" if wanted.batch_size == "auto" else rows,
        "gradient_accumulation_steps": batch // rows,
    }
    if body.seed is not None:
        training["seed"] = body.seed
    dataset: dict[str, Any] = {"file_id": body.training_file, "template": {"chat_template": "default"}}
    dataset |= {"test_size": 0} if body.validation_file is None else {"eval_file_id": body.validation_file}
    values: dict[str, Any] = {
        "kind": "ift",
        "adapter": name,
        "dataset": dataset,
        "training": training,
        "metadata": body.metadata or {},
        "model": {"name": base},
    }
    if parent is None:
        # Instruction tuning needs no new embeddings, and without them any server of LoRA adapters takes the result.
        values["lora"] = {"train_embeddings": False}
    else:
        values["init"] = {"adapter": parent, "mode": "continue"}
    return IftSpec.model_validate(values)


_STATUS = {"preparing": "validating_files"}


def job(row: JobRow) -> dict[str, Any]:
    """A training job, however it was made, as OpenAI's fine_tuning.job. organization_id is empty: there are none."""
    of, training = row.spec["dataset"], row.spec["training"]
    rows = training["per_device_train_batch_size"]
    hyper = {
        "n_epochs": training["num_train_epochs"],
        "batch_size": (AUTO_BATCH if rows == "auto" else rows) * training["gradient_accumulation_steps"],
        "learning_rate_multiplier": training["learning_rate"] / BASE_LEARNING_RATE,
    }
    eta = row.progress.get("eta_seconds") if row.status == "running" else None
    return {
        "id": row.id,
        "object": "fine_tuning.job",
        "created_at": int(row.created_at),
        "finished_at": None if row.finished_at is None else int(row.finished_at),
        "model": (row.spec.get("init") or {}).get("adapter") or row.spec["model"]["name"],
        "fine_tuned_model": row.adapter if row.status == "succeeded" else None,
        "organization_id": "",
        "result_files": [],
        "status": _STATUS.get(row.status, row.status),
        "training_file": of["file_id"] or of["path"],
        "validation_file": of.get("eval_file_id"),
        "hyperparameters": hyper,
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyper}},
        "trained_tokens": row.progress.get("tokens") if row.status == "succeeded" else None,
        "error": error(row.error),
        "seed": training["seed"],
        "estimated_finish": None if eta is None else int(time.time() + eta),
        "integrations": [],
        "metadata": row.spec.get("metadata") or {},
    }


def error(stored: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A job's error; up to 100 rows that were wrong follow in `rows`."""
    if stored is None:
        return None
    param = "training_file" if stored["code"] == "invalid_data" else None
    return {"code": stored["code"], "message": stored["message"], "param": param, "rows": stored.get("rows", [])}


def event(row: EventRow) -> dict[str, Any]:
    """OpenAI's event. Its id is what `after` takes."""
    level, kind, message = "info", "message", str(row.data.get("message", row.type))
    if row.type == "status":
        message = f"The job is {row.data['status']}"
        if row.data.get("reason"):
            message += f": {row.data['reason']}"
        level = "error" if row.data["status"] == "failed" else "info"
    elif row.type == "metrics":
        kind = "metrics"
        name = "loss" if row.data["split"] == "train" else "eval_loss"
        message = f"Step {row.data['step']}: {'training' if name == 'loss' else 'validation'} loss={row.data.get(name)}"
    elif row.type == "checkpoint":
        message = f"Checkpoint at step {row.data.get('step')}"
    return {
        "id": f"ftevent-{row.job_id}-{row.seq}",
        "object": "fine_tuning.job.event",
        "created_at": int(row.created_at),
        "level": level,
        "message": message,
        "type": kind,
        "data": row.data,
    }


def checkpoint(row: CheckpointRow, name: str) -> dict[str, Any]:
    return {
        "id": f"ftckpt-{row.job_id}-{row.step}",
        "object": "fine_tuning.job.checkpoint",
        "created_at": int(row.created_at),
        "fine_tuned_model_checkpoint": f"{name}@{row.step}",
        "fine_tuning_job_id": row.job_id,
        "metrics": {"step": row.step, "train_loss": row.loss, "valid_loss": row.eval_loss},
        "step_number": row.step,
    }
