"""The report of a dry run on the wire."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from service.jobs.schemas import JobError, Kind, Lineage


class Steps(BaseModel):
    """How the rows go through the training."""

    rows_per_step: int = Field(description="Rows of one optimiser step.")
    per_device_train_batch_size: int = Field(description="Rows of one pass; chosen, if the spec says auto.")
    gradient_accumulation_steps: int = Field(description="Passes of one step.")
    per_epoch: int = Field(description="Optimiser steps for one pass over the data.")
    total: int = Field(description="Optimiser steps of the whole training.")
    epochs: float = Field(description="Passes over the data of the whole training.")
    tokens: int = Field(description="Tokens of the whole training, padding not counted.")


class Parameters(BaseModel):
    """Weights of the model, counted from its configuration."""

    trainable: int = Field(description="Weights that are trained.")
    total: int = Field(description="All weights; one held in 4 bits counts as one.")


class Memory(BaseModel):
    """What the job will take of its device's memory at most. An estimate: docs/hardware.md says how near it is."""

    device: Literal["cuda", "cpu"] = Field(description="Kind of device that is counted for.")
    name: str | None = Field(None, description="Name of the device, if it is known.")
    of: str = Field(description="Whose device it is: this host's, or that of the newest run on the same base.")
    free_bytes: int | None = Field(
        None, description="Bytes free there now; all that it has, if it is another host's; null if unknown."
    )
    peak_bytes: int | None = Field(None, description="Bytes at the peak, the context apart; null if `why` says why.")
    context_bytes: int | None = Field(None, description="Bytes on top of it for CUDA, or for Python and its libraries.")
    parts: dict[str, int] | None = Field(
        None,
        description="Bytes of each part at the peak, which add up to peak_bytes. Training: base_weights, lora, embeddings, "
        "gradients, optimizer, activations, and one of recomputed_layer, loss, embedding_gradient; "
        "export: largest_tensor, verification.",
    )
    phase: str | None = Field(None, description="When the peak is: layer, loss, embeddings; merge, verification.")
    tokens_per_pass: int | None = Field(None, description="Tokens of the largest pass, padding included.")
    fits: bool | None = Field(
        None, description="Whether it fits into free_bytes with a margin of 15 %; null if that is not known."
    )
    why: str | None = Field(None, description="Why there is no estimate.")


class Disk(BaseModel):
    """What the job will take of the data folder's disk at most; with an object store, of the cache's."""

    needed_bytes: int = Field(description="Bytes at the fullest: the checkpoints kept, one being written, the result.")
    free_bytes: int = Field(description="Bytes free on this host's disk now.")
    fits: bool = Field(description="Whether needed_bytes are free.")
    adapter_bytes: int | None = Field(None, description="Bytes of the adapter's weights.")
    checkpoint_bytes: int | None = Field(None, description="Bytes of one checkpoint's weights and optimiser states.")
    checkpoints: int | None = Field(None, description="Checkpoints kept at most.")


class Time(BaseModel):
    """How long the training steps will take, from this installation's own runs; null where there are none."""

    seconds: float | None = Field(None, description="Seconds of training steps, without evaluations and checkpoints.")
    tokens_per_second: float | None = Field(None, description="Median speed of the runs that it is taken from.")
    runs: int = Field(description="Runs that the speed is taken from.")
    device: str | None = Field(None, description="Device of those runs.")
    why: str | None = Field(None, description="Why there is no estimate.")


class DryRun(BaseModel):
    """What a job would do. What could not be found out because of `error` is null."""

    object: Literal["job.dry_run"] = Field("job.dry_run", description="Always 'job.dry_run'.")
    ok: bool = Field(description="Whether nothing was found for which the job would fail.")
    kind: Kind = Field(description="Kind of job.")
    adapter: str = Field(description="Adapter it would make or export.")
    spec: dict[str, Any] = Field(description="The spec with every default filled in, as the job would have it.")
    lineage: Lineage = Field(description="Where it would come from.")
    error: JobError | None = Field(description="What the job would fail with, as its own error would be.")
    data: dict[str, Any] | None = Field(
        None,
        description="As the run's record has it: rows, bad, train_rows, eval_rows, train_tokens, eval_tokens, trained_tokens, "
        "truncated_rows, dropped_rows (without a trained token), windows, longest, mean_tokens, columns, fingerprint.",
    )
    steps: Steps | None = Field(None, description="Passes, steps and tokens of the training.")
    parameters: Parameters | None = Field(None, description="Trained and all weights.")
    export: dict[str, Any] | None = Field(
        None, description="Of an export: format, methods, merged_into, tensor_types, untied; or why it is not known."
    )
    memory: Memory | None = Field(None, description="Device memory.")
    disk: Disk | None = Field(None, description="Disk.")
    time: Time | None = Field(None, description="Time.")
