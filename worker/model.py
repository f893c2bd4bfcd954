"""Models for training: the base through Unsloth, LoRA on it, and what an instruction tuning starts from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

# First: it patches transformers, trl and peft as they are imported.
import unsloth
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from peft import get_peft_model as plain_get_peft_model
from peft.utils import ModulesToSaveWrapper
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, TrainerCallback

from service.errors import JobFailure
from service.specs import LoraSpec, ModelSpec
from worker import adapter_io
from worker.memory import WIDE_CHUNK_ROWS

EMBEDDINGS = ("embed_tokens", "lm_head")


def on_gpu() -> bool:
    return bool(torch.cuda.is_available())


def load_base(model: ModelSpec, base: str, *, checkpointing: bool, token: str | None, trust_remote_code: bool) -> Any:
    """Load the base model as the spec says. Raises JobFailure for one that cannot be had as asked."""
    dtype = None if model.dtype == "auto" else getattr(torch, model.dtype)
    loaded, _ = unsloth.FastLanguageModel.from_pretrained(
        model_name=base,
        revision=model.revision,
        max_seq_length=model.max_seq_length,
        dtype=dtype,
        load_in_4bit=model.load_in_4bit,
        token=token,
        trust_remote_code=trust_remote_code,
        use_gradient_checkpointing="unsloth" if checkpointing else False,
    )
    if model.load_in_4bit and not getattr(loaded, "is_loaded_in_4bit", False):
        # Unsloth's CPU backend falls back to 16 bits in silence; a spec that says 4 bits must not be called done with 16.
        raise JobFailure(
            "unsupported", "model.load_in_4bit: bitsandbytes cannot hold this model in 4 bits on this machine"
        )
    return loaded


def add_lora(model: Any, lora: LoraSpec, *, seed: int, checkpointing: bool, plain: bool = False) -> PeftModel:
    """Put LoRA on the named projections and, with train_embeddings, make embed_tokens and lm_head fully trainable.

    Both matrices go to PEFT's modules_to_save, by name: as LoRA targets they would train at the main learning rate.
    With tied embeddings they become two matrices. `plain` avoids Unsloth's fused LoRA kernels, which know one active
    adapter only. Raises JobFailure for modules that the model does not have.
    """
    leaves = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Embedding))
    }
    missing = [t for t in lora.target_modules if t not in leaves]
    if missing:
        raise JobFailure(
            "invalid_spec",
            f"lora.target_modules: no module named {', '.join(missing)}; the model has {', '.join(sorted(leaves))}",
        )
    if lora.train_embeddings and not set(EMBEDDINGS) <= leaves:
        raise JobFailure(
            "invalid_spec",
            f"lora.train_embeddings: no modules named {' and '.join(EMBEDDINGS)}; the model has {', '.join(sorted(leaves))}",
        )
    common: dict[str, Any] = {
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "bias": lora.bias,
        "use_rslora": lora.use_rslora,
    }
    if plain and on_gpu():
        config = LoraConfig(
            **common,
            target_modules=list(lora.target_modules),
            modules_to_save=list(EMBEDDINGS) if lora.train_embeddings else None,
            task_type="CAUSAL_LM",
        )
        torch.manual_seed(seed)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        peft_model = plain_get_peft_model(model, config)
    else:
        peft_model = unsloth.FastLanguageModel.get_peft_model(
            model,
            **common,
            target_modules=[*lora.target_modules, *(EMBEDDINGS if lora.train_embeddings else ())],
            use_gradient_checkpointing="unsloth" if checkpointing else False,
            random_state=seed,
            # Two matrices also for a tied base, on every device: Unsloth would tie them on a GPU and not on a CPU.
            ensure_weight_tying=False,
        )
    if lora.loftq_config:
        init_loftq(peft_model)
    return peft_model


def offload_originals(model: PeftModel) -> None:
    """Keep the frozen matrices that trained embeddings stand for on the host: no pass reads them."""
    if not on_gpu():
        return
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            for parameter in module.original_module.parameters():
                parameter.data = parameter.data.to("cpu")


class OriginalsOffDevice(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """What accelerate has put onto the GPU with the rest of the model, and no pass reads, goes off it again."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        offload_originals(model)


def widen_loss_chunks() -> None:
    """Let Unsloth's fused loss take more rows of logits at a time, where memory is not short.

    It takes 512 at a vocabulary of 128k, so that each chunk's product with the head, and the sum into its gradient, move
    far more than they compute.
    """
    if on_gpu():
        from unsloth_zoo.fused_losses import fused_linear

        if hasattr(fused_linear, "_MIN_ROWS"):  # a private name: another version may do without it
            fused_linear._MIN_ROWS = max(fused_linear._MIN_ROWS, WIDE_CHUNK_ROWS)


def init_loftq(model: PeftModel) -> None:
    """LoftQ (arXiv 2310.08659) for a base already in NF4: A and B become the best rank-r fit of each layer's rounding error.

    The base stays as it is, so the adapter fits every NF4 copy of it. PEFT's replace_lora_weights_loftq does the same
    on CUDA only and leaves the LoRA scaling out of account; here B·A·scaling equals the fit. Reads the 16-bit weights
    from the base's own safetensors; raises JobFailure where there are none.
    """
    import bitsandbytes as bnb
    from peft.tuners.lora.bnb import Linear4bit

    weights = _safetensors_index(model.config.name_or_path)
    for name, module in model.named_modules():
        if not isinstance(module, Linear4bit):
            continue
        key = name.removeprefix("base_model.model.") + ".weight"
        if key not in weights:
            raise JobFailure("unsupported", f"lora.loftq_config: the base's files hold no 16-bit {key}")
        with safe_open(weights[key], framework="pt") as file:
            exact = file.get_tensor(key).to(module.weight.device, torch.float32)
        if exact.dim() != 2 or exact.shape != module.weight.quant_state.shape:
            raise JobFailure(
                "unsupported", "lora.loftq_config: the base's files are quantised already; name the 16-bit model"
            )
        residual = exact - bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).float()
        u, s, v = torch.svd_lowrank(residual, q=min(module.r["default"] + 8, *residual.shape), niter=4)
        rank = module.r["default"]
        root = (s[:rank] / module.scaling["default"]).sqrt()
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        a.data.zero_()[: root.numel()] = (root[:, None] * v[:, :rank].T).to(a.dtype)
        b.data.zero_()[:, : root.numel()] = (u[:, :rank] * root).to(b.dtype)


def _safetensors_index(base: str) -> dict[str, Path]:
    """Tensor name → file, for a model folder or a hub id whose files are in the cache."""
    folder = Path(base)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(base, allow_patterns=["*.safetensors", "*.json"]))
    index: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            index |= dict.fromkeys(file.keys(), path)
    return index


def adapter_lora(config: dict[str, Any]) -> dict[str, Any]:
    """The LoRA fields of an adapter_config.json, in LoraSpec's names."""
    return {
        "r": config["r"],
        "lora_alpha": config["lora_alpha"],
        "use_rslora": config.get("use_rslora", False),
        "target_modules": sorted(config["target_modules"]),
        "train_embeddings": bool(config.get("modules_to_save")),
    }


def continue_from(model: PeftModel, parent: Path, lora: LoraSpec) -> None:
    """Load the parent's matrices into the trainable adapter. Raises JobFailure if the two differ in shape or scaling."""
    theirs = adapter_lora(json.loads((parent / "adapter_config.json").read_text()))
    ours = {**lora.model_dump(include=set(theirs)), "target_modules": sorted(lora.target_modules)}
    for field, value in ours.items():
        if value != theirs[field]:
            raise JobFailure(
                "invalid_spec",
                f"lora.{field}: init.mode 'continue' trains the adapter's own matrices on, "
                f"so it must be {theirs[field]!r}, not {value!r}",
            )
    load_weights(model, parent)


def load_weights(model: PeftModel, folder: Path, adapter: str = "default") -> None:
    """Load adapter_model.safetensors into an adapter of the model. Raises JobFailure unless every tensor found its place."""
    state = load_file(folder / "adapter_model.safetensors")
    result = set_peft_model_state_dict(model, state, adapter_name=adapter)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad and f".{adapter}." in n}
    lost = sorted(trainable & set(result.missing_keys)) + sorted(result.unexpected_keys)
    if lost:
        raise JobFailure(
            "internal_error",
            f"adapter weights do not fit the model: {', '.join(lost[:3])} and {max(0, len(lost) - 3)} more",
        )


def stack_on(model: Any, parent: Path, lora: LoraSpec, *, seed: int, checkpointing: bool) -> PeftModel:
    """Freeze the parent adapter and add a new trainable LoRA beside it; both act on every forward pass.

    The parent's trained embeddings, if it has any, become the base's own (untied), from which the new adapter starts.
    """
    config = json.loads((parent / "adapter_config.json").read_text())
    state = load_file(parent / "adapter_model.safetensors")
    embeddings = {k: state.pop(k) for k in list(state) if adapter_io.is_embedding(k)}
    put_embeddings(model, embeddings)
    peft_model = add_lora(model, lora, seed=seed, checkpointing=checkpointing, plain=True)
    keep = ("r", "lora_alpha", "use_rslora", "target_modules", "rank_pattern", "alpha_pattern", "bias")
    frozen = LoraConfig(
        **{k: config[k] for k in keep if config.get(k)}, lora_dropout=0.0, task_type="CAUSAL_LM", inference_mode=True
    )
    peft_model.add_adapter("parent", frozen)
    set_peft_model_state_dict(peft_model, state, adapter_name="parent")
    peft_model.base_model.set_adapter(["default", "parent"])
    for name, parameter in peft_model.named_parameters():
        if ".parent." in name:
            parameter.requires_grad_(False)
    return peft_model


def put_embeddings(model: Any, state: dict[str, torch.Tensor]) -> None:
    """Replace embed_tokens and lm_head of a base model by trained ones; tied ones are untied. Nothing for an empty dict."""
    if not state:
        return
    for key, weight in state.items():
        module = model.get_output_embeddings() if key.endswith("lm_head.weight") else model.get_input_embeddings()
        module.weight = nn.Parameter(weight.to(module.weight.device, module.weight.dtype), requires_grad=False)
    model.config.tie_word_embeddings = False


def count_parameters(model: Any) -> dict[str, int]:
    """Trainable and total parameters; a 4-bit weight counts its unpacked elements."""
    trainable = total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        n = int(state.shape.numel()) if state is not None else parameter.numel()
        total += n
        trainable += n if parameter.requires_grad else 0
    return {"trainable_parameters": trainable, "total_parameters": total}


def config_of(base: str, model: ModelSpec, token: str | None, trust_remote_code: bool) -> Any:
    """The base model's configuration. Raises JobFailure("model_not_found")."""
    try:
        return AutoConfig.from_pretrained(
            base, revision=model.revision, token=token, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise JobFailure("model_not_found", f"model {model.name}: {str(error).splitlines()[0]}") from error


def compute_types(model: Any, args: Any) -> dict[str, Any]:
    """What the run really computed in: the base's type, 4 bits or not, autocast."""
    autocast = "bfloat16" if args.bf16 else "float16" if args.fp16 else None
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "load_in_4bit": bool(getattr(model, "is_loaded_in_4bit", False)),
        "autocast": autocast,
    }


def trained_on(model: Any) -> dict[str, Any]:
    """As what the base was held: its type, and its BitsAndBytesConfig if in 4 bits. An export must merge into the same."""
    quantization: Any = None
    if getattr(model, "is_loaded_in_4bit", False):
        quantization = getattr(model.config, "quantization_config", None)
        if hasattr(quantization, "to_dict"):
            quantization = quantization.to_dict()
        # Unsloth leaves a dict with torch's own types in it, which no JSON holds; bitsandbytes' config takes their names.
        quantization = {
            key: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
            for key, value in (quantization or {}).items()
        }
    return {"dtype": str(model.dtype).removeprefix("torch."), "quantization_config": quantization}
