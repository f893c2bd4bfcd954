"""Adapters on the wire."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from service.engine_client import NOT_FOR_VLLM
from service.models import AdapterRow
from service.spec_fields import check_adapter_name


class Servable(BaseModel):
    lorry: bool = Field(description="Whether lorry's own engine serves it: always, unless its files are gone.")
    vllm: bool = Field(description="Whether a vLLM server can load it.")
    why: str | None = Field(description="What keeps vLLM, or both, from it.")


class Adapter(BaseModel):
    name: str = Field(description="Its name, for /generate and as OpenAI's `model`.")
    object: Literal["adapter"] = Field("adapter", description="Always 'adapter'.")
    base: str = Field(description="Base model it belongs to.")
    kind: str = Field(description="Kind of the job that made it: cpt or ift.")
    job: str = Field(description="Job that made it.")
    step: int | None = Field(description="Optimiser step its weights are from.")
    r: int | None = Field(description="Rank.")
    lora_alpha: float | None = Field(description="Scaling numerator.")
    use_rslora: bool | None = Field(description="Whether the update is scaled by lora_alpha / sqrt(r).")
    target_modules: list[str] | None = Field(description="Linear layers with a LoRA.")
    train_embeddings: bool | None = Field(description="Whether it carries its own embed_tokens and lm_head.")
    template: dict[str, Any] = Field(description="The template it was trained with, with which it is prompted.")
    parent: str | None = Field(description="Adapter it was started from.")
    bytes: int = Field(description="Size on disk.")
    loaded: bool | None = Field(description="Whether an engine holds it now; null if none answers.")
    pinned: bool = Field(
        description="Pinned adapters are kept by clean-ups, and in the memory of an engine that holds them."
    )
    servable_by: Servable = Field(description="Which engines can serve it.")
    eval_loss: float | None = Field(description="Evaluation loss at its step, in nats per token.")
    created_at: int = Field(description="Unix seconds.")


class Loaded(BaseModel):
    name: str = Field(description="What was loaded or unloaded.")
    loaded: bool = Field(description="Whether an engine holds it now.")


class Change(BaseModel):
    """What to change; at least one."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, AfterValidator(check_adapter_name)] | None = Field(None, description="New name; must be free.")
    pinned: bool | None = Field(None, description="Pin or unpin.")

    @model_validator(mode="after")
    def _check(self) -> Change:
        if self.name is None and self.pinned is None:
            raise ValueError("give name or pinned")
        return self


def adapter(row: AdapterRow, loaded: bool | None) -> Adapter:
    config = row.config
    full = bool(config.get("train_embeddings"))
    # One in an object store is taken to be there: to ask for each row of a list takes too long, and reconcile() looks.
    there = row.path is not None and (not Path(row.path).is_absolute() or Path(row.path).is_dir())
    why = NOT_FOR_VLLM if full else None
    if not there:
        why = "its files are gone; delete it, or restore them from a backup"
    return Adapter(
        name=row.name,
        base=row.base,
        kind=row.kind,
        job=row.job_id,
        step=row.step,
        r=config.get("r"),
        lora_alpha=config.get("lora_alpha"),
        use_rslora=config.get("use_rslora"),
        target_modules=config.get("target_modules"),
        train_embeddings=config.get("train_embeddings"),
        template=row.template,
        parent=row.parent,
        bytes=row.bytes,
        loaded=loaded,
        pinned=row.pinned,
        servable_by=Servable(lorry=there, vllm=there and not full, why=why),
        eval_loss=row.eval_loss,
        created_at=int(row.created_at),
    )
