"""Job specs: what a client may ask for. A discriminated union on `kind`; unknown fields are errors.

Field names are those of PEFT, TRL, transformers and datasets; the training defaults are a practitioner's recipe for
continued pre-training in a new language or domain and instruction tuning on top of it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, TypeAdapter, model_validator

from service.job_spec import JobSpec, Spec
from service.spec_fields import (
    GGUF_LORA_METHODS,
    GGUF_METHODS,
    AdapterName,
    AdapterRef,
    BatchSize,
    FileSize,
    Methods,
    Optimizer,
    Scheduler,
    size_in_bytes,
)

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class ModelSpec(Spec):
    """The base model."""

    name: str | None = Field(
        None, min_length=1, description="Built-in name, hub id or local folder. Default: the server's LORRY_BASE_MODEL."
    )
    revision: str | None = Field(None, description="Hub branch, tag or commit.")
    max_seq_length: int = Field(
        2048,
        ge=16,
        le=1_048_576,
        description="Longest training sequence, in tokens; longer text is cut into windows (CPT) or truncated (IFT).",
    )
    load_in_4bit: bool = Field(True, description="Hold the frozen base in NF4 (QLoRA).")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto",
        description="Compute type; auto is bfloat16 where the device has it, else float32 on a CPU and float16 on a GPU.",
    )


class LoftqSpec(Spec):
    """LoftQ initialisation (Li et al. 2023, arXiv 2310.08659) of the LoRA matrices against NF4's rounding error."""

    loftq_bits: Literal[4] = Field(4, description="Bits of the quantised base; only 4.")
    loftq_iter: Literal[1] = Field(
        1, description="Iterations per layer; 1, since the base's own rounding stays as it is."
    )


class LoraSpec(Spec):
    """peft.LoraConfig's fields."""

    r: int = Field(64, ge=1, le=1024, description="Rank of the update matrices.")
    lora_alpha: float = Field(
        128,
        gt=0,
        description="Scaling numerator: the update is scaled by lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA.",
    )
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before the LoRA matrices, as a fraction.")
    bias: Literal["none", "all", "lora_only"] = Field("none", description="Which biases are trained.")
    use_rslora: bool = Field(True, description="Rank-stabilised scaling (Kalajdzievski 2023, arXiv 2312.03732).")
    loftq_config: LoftqSpec | None = Field(
        None, description="LoftQ initialisation; needs model.load_in_4bit and a base with 16-bit weights."
    )
    target_modules: list[str] = Field(PROJECTIONS, min_length=1, description="Linear layers that get a LoRA.")
    train_embeddings: bool = Field(
        True, description="Train embed_tokens and lm_head fully, at training.embedding_learning_rate."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        full = {"embed_tokens", "lm_head"} & set(self.target_modules)
        if full:
            # In target_modules they would become LoRA targets at the main learning rate.
            raise ValueError(
                f"target_modules: {', '.join(sorted(full))} cannot be a LoRA target here; set train_embeddings to train it fully"
            )
        if len(set(self.target_modules)) != len(self.target_modules):
            raise ValueError("target_modules: a name stands twice")
        return self


class TemplateSpec(Spec):
    """How a row becomes text. Either `prompt` (with `response` for instruction data) or `chat_template`."""

    prompt: str | None = Field(
        None,
        description="Text with {column} placeholders, e.g. '### 제목: {title}\\n\\n{text}'. '{{' and '}}' are literal braces.",
    )
    response: str | None = Field(
        None, description="Text of the answer, with {column} placeholders; what train_on_responses_only trains on."
    )
    chat_template: str | None = Field(
        None,
        description="'default' (the model's own), a name of Unsloth's get_chat_template (e.g. 'llama-3.1', 'chatml') or a Jinja string; "
        "rows have a messages (role/content) or conversations (ShareGPT from/value) column.",
    )
    system: str | None = Field(
        None, description="System message put before conversations that have none (chat templates only)."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.prompt is None) == (self.chat_template is None):
            raise ValueError("give either prompt or chat_template")
        if self.chat_template is not None and self.response is not None:
            raise ValueError("response goes with prompt, not with chat_template")
        if self.system is not None and self.chat_template is None:
            raise ValueError("system goes with chat_template")
        return self


class DatasetSpec(Spec):
    """Where the rows come from: a hub set (`path`) or an upload (`file_id`)."""

    path: str | None = Field(None, min_length=1, description="Hub id or local folder, as in datasets.load_dataset.")
    name: str | None = Field(None, description="Configuration of the hub set.")
    revision: str | None = Field(None, description="Hub branch, tag or commit of the set.")
    split: str = Field("train", min_length=1, description="Split, with datasets' slicing, e.g. 'train[:10%]'.")
    file_id: str | None = Field(None, description="Id of an upload (POST /v1/files).")
    eval_file_id: str | None = Field(
        None,
        description="Id of an upload whose rows are the evaluation rows, in place of test_size; with file_id only.",
    )
    streaming: bool = Field(False, description="Read the hub set as a stream and keep max_samples rows of it.")
    max_samples: int | None = Field(
        None, ge=1, description="At most this many rows, chosen by seed (the first ones when streaming)."
    )
    test_size: float = Field(
        0.01, ge=0, description="Evaluation rows: a fraction below 1, or a number of rows; 0 for none."
    )
    seed: int = Field(42, ge=0, le=2**32 - 1, description="Seed of the shuffle and of the split.")
    template: TemplateSpec = Field(description="How a row becomes text.")

    @model_validator(mode="before")
    @classmethod
    def _no_split(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("eval_file_id") is not None:
            return {"test_size": 0, **data}
        return data

    @property
    def evaluates(self) -> bool:
        return bool(self.test_size) or self.eval_file_id is not None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.path is None) == (self.file_id is None):
            raise ValueError("give either path or file_id")
        if self.eval_file_id is not None:
            if self.file_id is None:
                raise ValueError("eval_file_id: goes with file_id, not with path")
            if self.test_size:
                raise ValueError("test_size: eval_file_id gives the evaluation rows; leave one of the two out")
        if self.streaming and self.path is None:
            raise ValueError("streaming: only for hub sets")
        if self.streaming and self.max_samples is None:
            raise ValueError("streaming: needs max_samples, the number of rows to take from the stream")
        if self.test_size >= 1 and self.test_size != int(self.test_size):
            raise ValueError("test_size: a fraction below 1 or a whole number of rows")
        return self


class TrainingSpec(Spec):
    """transformers.TrainingArguments' fields, plus Unsloth's embedding_learning_rate."""

    per_device_train_batch_size: BatchSize = Field(
        8,
        description="Sequences per forward pass; auto: the largest power of two that fits the device's free memory, with the number of passes changed so that a step has 8 × gradient_accumulation_steps rows. The run's record and a log event tell the choice.",
    )
    per_device_eval_batch_size: int = Field(8, ge=1, le=4096, description="Sequences per evaluation pass.")
    gradient_accumulation_steps: int = Field(
        2,
        ge=1,
        le=4096,
        description="A step has this many times the batch's rows; the loss is averaged over all their tokens.",
    )
    warmup_ratio: float = Field(
        0.1, ge=0, le=1, description="Fraction of the steps over which the learning rate rises from 0."
    )
    num_train_epochs: float = Field(1, gt=0, le=1000, description="Passes over the data; max_steps overrides it.")
    max_steps: int = Field(-1, ge=-1, description="Optimiser steps; -1: as num_train_epochs says.")
    learning_rate: float = Field(5e-5, gt=0, le=1, description="Peak learning rate of the LoRA matrices.")
    embedding_learning_rate: float = Field(
        1e-5, gt=0, le=1, description="Peak learning rate of embed_tokens and lm_head."
    )
    optim: Optimizer = Field(
        "adamw_8bit",
        description="Optimiser; on a machine without a GPU the 8-bit and paged ones become adamw_torch_fused, and the run's record says so.",
    )
    weight_decay: float = Field(0.01, ge=0, le=1, description="Decoupled weight decay.")
    max_grad_norm: float = Field(1.0, ge=0, description="Gradient clipping norm; 0 turns it off.")
    lr_scheduler_type: Scheduler = Field("linear", description="Shape of the learning rate after the warm-up.")
    logging_steps: int = Field(
        100, ge=1, description="Optimiser steps between training metrics; the first and last step are always logged."
    )
    eval_steps: int = Field(
        500,
        ge=1,
        description="Optimiser steps between evaluations; there is one before the first step and one after the last, too.",
    )
    save_steps: int = Field(1000, ge=1, description="Optimiser steps between checkpoints.")
    save_total_limit: int = Field(
        5, ge=1, description="Checkpoints kept; the best one stays with load_best_model_at_end."
    )
    packing: Literal["auto"] | bool = Field(
        "auto",
        description="Several rows in one pass without padding, each with its own attention; auto: on a GPU, if the model keeps rows apart. What is learnt is the same.",
    )
    gradient_checkpointing: Literal["auto"] | bool = Field(
        "auto",
        description="Compute activations again in the backward pass instead of keeping them; auto: where they would not fit the free memory. Keeping them is a third faster on a GPU, with passes as large as the memory then bears.",
    )
    early_stopping_patience: int | None = Field(
        None,
        ge=1,
        description="Stop after this many evaluations without a lower eval_loss; implies load_best_model_at_end.",
    )
    load_best_model_at_end: bool = Field(
        False, description="Keep the checkpoint with the lowest eval_loss as the adapter."
    )
    train_on_responses_only: bool = Field(
        False, description="Mask prompts, so that only answers are trained on (instruction tuning)."
    )
    seed: int = Field(3407, ge=0, le=2**32 - 1, description="Seed of initialisation, order of rows and dropout.")

    @property
    def keeps_best(self) -> bool:
        return self.load_best_model_at_end or self.early_stopping_patience is not None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_steps == 0:
            raise ValueError("max_steps: -1 or at least 1")
        if self.keeps_best and self.save_steps % self.eval_steps:
            raise ValueError(
                "save_steps: must be a multiple of eval_steps when the best checkpoint is kept, so that each checkpoint has an eval_loss"
            )
        return self


class InitSpec(Spec):
    """The adapter an instruction tuning starts from."""

    adapter: AdapterRef = Field(
        description="Name of a finished adapter, or of the adapter of a job in `after`; name@step for a checkpoint."
    )
    mode: Literal["continue", "stack", "merge"] = Field(
        "continue",
        description="continue: train the adapter's own matrices on. stack: freeze it and train a second LoRA on top. "
        "merge: fold it into 16-bit base weights and train a new LoRA on those. All give one adapter for the same base.",
    )


class TrainSpec(JobSpec):
    adapter: AdapterName = Field(description="Name of the adapter to make; must be free.")
    model: ModelSpec = Field(default_factory=ModelSpec, description="Base model.")
    lora: LoraSpec = Field(default_factory=LoraSpec, description="LoRA.")
    dataset: DatasetSpec = Field(description="Data.")
    training: TrainingSpec = Field(default_factory=TrainingSpec, description="Optimisation.")

    @model_validator(mode="after")
    def _check_train(self) -> Self:
        if self.lora.loftq_config and not self.model.load_in_4bit:
            raise ValueError("lora.loftq_config: needs model.load_in_4bit, since it corrects 4-bit rounding")
        if self.training.keeps_best and not self.dataset.evaluates:
            raise ValueError(
                "training: keeping the best checkpoint needs evaluation rows (dataset.test_size or dataset.eval_file_id)"
            )
        return self


class CptSpec(TrainSpec):
    """Continued pre-training on raw text."""

    kind: Literal["cpt"] = Field(description="Continued pre-training.")

    @model_validator(mode="after")
    def _check_cpt(self) -> Self:
        if self.dataset.template.response is not None:
            raise ValueError("dataset.template.response: continued pre-training trains on all text; put it into prompt")
        if self.training.train_on_responses_only:
            raise ValueError("training.train_on_responses_only: only for ift")
        return self


class IftSpec(TrainSpec):
    """Instruction fine-tuning."""

    kind: Literal["ift"] = Field(description="Instruction fine-tuning.")
    init: InitSpec | None = Field(None, description="Adapter to start from; none: the base model.")

    @model_validator(mode="after")
    def _check_ift(self) -> Self:
        template = self.dataset.template
        if template.prompt is not None and template.response is None:
            raise ValueError("dataset.template.response: instruction tuning needs the answer apart from the prompt")
        if self.init and self.init.mode == "merge" and self.model.load_in_4bit:
            raise ValueError(
                "model.load_in_4bit: init.mode 'merge' folds the adapter into 16-bit weights; set it to false, or use 'stack'"
            )
        if self.init and self.init.mode == "continue" and self.lora.loftq_config:
            raise ValueError(
                "lora.loftq_config: 'continue' goes on from the adapter's own matrices, which LoftQ would replace"
            )
        return self


class ExportSpec(JobSpec):
    """Write an adapter in a form other tools load."""

    kind: Literal["export"] = Field(description="Export.")
    adapter: AdapterRef = Field(description="Adapter to export, or name@step.")
    format: Literal["lora", "merged_16bit", "merged_4bit", "gguf"] = Field(
        "lora",
        description="lora: PEFT folder; merged_16bit: a transformers model; merged_4bit: one in bitsandbytes NF4; "
        "gguf: files for llama.cpp and Ollama.",
    )
    quantization_method: Methods | None = Field(
        None,
        description=f"Types of the GGUF files, one or several: {', '.join(GGUF_METHODS)}. Default for gguf: q8_0. "
        f"With lora: also write the adapter as GGUF LoRA, in {', '.join(GGUF_LORA_METHODS)}.",
        json_schema_extra={
            "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "null"}]
        },
    )
    base: str | None = Field(
        None,
        min_length=1,
        description="For merged formats and gguf: the 16-bit original (folder or hub id) to merge into, instead of the "
        "dequantised 4-bit base that was trained against. Architecture and shapes must be the same.",
    )
    max_shard_size: FileSize = Field(
        "5GB", description="Largest safetensors file of a merged model, e.g. '500MB' or '5GB' (powers of ten)."
    )
    verify: bool = Field(
        True, description="Read the result back with the tool that will load it and compare it with the live adapter."
    )

    @property
    def methods(self) -> list[str]:
        """The GGUF types to write; empty if none."""
        return self.quantization_method or (["q8_0"] if self.format == "gguf" else [])

    @property
    def shard_bytes(self) -> int:
        """max_shard_size in bytes."""
        return size_in_bytes(self.max_shard_size)

    @model_validator(mode="after")
    def _check_export(self) -> Self:
        methods = self.quantization_method
        if methods is not None:
            known = {"gguf": GGUF_METHODS, "lora": GGUF_LORA_METHODS}.get(self.format)
            if known is None:
                raise ValueError(f"quantization_method: only for format gguf or lora, not for {self.format}")
            if not methods:
                raise ValueError("quantization_method: an empty list")
            for method in methods:
                if method not in known:
                    what = "a GGUF LoRA" if self.format == "lora" else "gguf"
                    raise ValueError(f"quantization_method: {method!r} is none of those of {what}: {', '.join(known)}")
            if len(set(methods)) != len(methods):
                raise ValueError("quantization_method: a type stands twice")
        if self.base is not None and self.format == "lora":
            raise ValueError("base: only for merged formats and gguf; a LoRA is not merged into anything")
        return self


AnySpec = Annotated[CptSpec | IftSpec | ExportSpec, Field(discriminator="kind")]
_SPECS: TypeAdapter[CptSpec | IftSpec | ExportSpec] = TypeAdapter(AnySpec)


def parse_spec(data: Any) -> CptSpec | IftSpec | ExportSpec:
    """Validate a stored or received spec. Raises pydantic.ValidationError."""
    return _SPECS.validate_python(data)
