"""What a client may ask for of every kind of job, on top of which service/specs.py puts the kinds."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from service.spec_fields import Gpus, Metadata, PoolName, Priority, RepoId


class Spec(BaseModel):
    """Base of every part of a spec: unknown fields are errors, and a spec never changes once made."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class HubSpec(Spec):
    """A repository of the Hugging Face hub, or of the server that the worker's HF_ENDPOINT names."""

    repo_id: RepoId = Field(description="owner/name of a model repository.")
    private: bool = Field(
        True,
        description="Make the repository private if it does not exist; an existing one must not be public then.",
    )
    revision: str | None = Field(
        None,
        max_length=200,
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9_./-]*$",
        description="Branch to push to; made from main if it does not exist. Default: main.",
    )


class ResourcesSpec(Spec):
    """What a job needs of the worker that takes it."""

    gpus: Gpus = Field(
        None,
        description="1 or more: only a worker for jobs that need a GPU; 0: a worker for jobs that need none; "
        "null: a worker for jobs that need nothing in particular, which on a GPU host has one. "
        "A training on several GPUs takes per_device_train_batch_size × gradient_accumulation_steps rows a step on each; "
        "a worker that owns fewer fails the job.",
    )
    pool: PoolName | None = Field(
        None,
        description="Only workers told to serve the pool of this name (LORRY_WORKER_QUEUES=pool:NAME); "
        "with it, gpus does not decide who takes the job.",
    )


class JobSpec(Spec):
    metadata: Metadata = Field(
        default_factory=dict,
        description="Up to 16 pairs of your own (keys to 64, values to 512 characters); kept as given.",
    )
    after: list[str] = Field(
        default_factory=list,
        max_length=64,
        description="Ids of jobs that must succeed first; if one fails, this one fails with its reason.",
    )
    resources: ResourcesSpec = Field(default_factory=ResourcesSpec, description="Which workers may take the job.")
    priority: Priority = Field(
        "normal",
        description="Waiting jobs of high priority are taken before all others, those of low priority after all others; "
        "a running job is never interrupted for one.",
    )
    push_to_hub: HubSpec | None = Field(
        None,
        description="Push the result, with a model card, to a model repository. "
        "The token is the request's X-HF-Token header, else the worker's HF_TOKEN.",
    )
