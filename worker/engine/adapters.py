"""PEFT LoRA folders read from disk and checked against the base. Which are kept: worker/engine/registry.py."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from service.bases import base_key
from service.errors import Conflict, Invalid, NotFound
from service.templates import StoredTemplate
from worker.engine.lora import AdapterWeights, LoraPair
from worker.engine.transfer import packed

_PREFIX = "base_model.model."
_KEY = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B|(?:base_layer\.)?weight|(?:base_layer\.)?bias)"
)
# What changes the forward pass in a way the sites do not know. PEFT's default for each is false or empty.
_UNSUPPORTED = (
    "use_dora",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "use_qalora",
    "layer_replication",
    "lora_bias",
    "corda_config",
    "arrow_config",
)


@dataclass(frozen=True)
class Adapter:
    """An adapter in memory. `tokenizer` and `template` are the base's where it has none of its own."""

    name: str
    path: Path
    weights: AdapterWeights
    template: StoredTemplate | None
    tokenizer: Any
    fingerprint: tuple[tuple[str, int, int], ...]
    bytes: int  # of its weights


@dataclass(frozen=True)
class BaseInfo:
    """What an adapter is checked against and loaded onto."""

    names: frozenset[str]  # names under which the base is known: setting, folder, hub id
    model: nn.Module
    head: nn.Module
    tokenizer: Any
    tokenizer_hash: str | None
    template: StoredTemplate | None
    dtype: torch.dtype
    device: torch.device


def tokenizer_hash(folder: Path) -> str | None:
    """Digest of what decides a text's tokens and its end token, or None if the folder has no tokenizer."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    return hashlib.sha256(file.read_bytes()).hexdigest()


def read_adapter(name: str, path: Path, base: BaseInfo) -> Adapter:
    """Read a PEFT LoRA folder into the host's memory, as the engine's device will hold it.

    Raises NotFound for a folder that is not there, Conflict for an adapter of another base, Invalid for one that is
    damaged or of a kind that cannot be served.
    """
    config_file, weights_file = path / "adapter_config.json", path / "adapter_model.safetensors"
    for file in (config_file, weights_file):
        if not file.is_file():
            raise NotFound(f"no adapter found at {path}: {file.name} is missing", code="adapter_not_found")
    try:
        config: dict[str, Any] = json.loads(config_file.read_text("utf-8"))
        state = load_file(weights_file)
        found = _stored_template(path)
    except (ValueError, SafetensorError, OSError) as error:
        raise Invalid(
            f"adapter {name}: its files are damaged: {error}", param="lora_path", code="invalid_adapter"
        ) from error
    _check_kind(name, config)
    known_as = config.get("base_model_name_or_path") or ""
    if known_as and base_key(known_as) not in {base_key(n) for n in base.names}:
        raise Conflict(
            f"adapter {name} was trained on {known_as}; this engine holds {_shortest(base.names)}", code="wrong_base"
        )
    weights = _weights(name, config, state, base)
    return Adapter(
        name,
        path,
        packed(weights) if base.device.type == "cuda" else weights,
        found or base.template,
        _tokenizer(path, base),
        fingerprint(path),
        weights.bytes,
    )


def fingerprint(path: Path) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of the files an adapter is read from, to notice that a folder has other content now."""
    files = [
        path / n for n in ("adapter_config.json", "adapter_model.safetensors", "lorry_template.json", "tokenizer.json")
    ]
    return tuple((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file())


def _shortest(names: frozenset[str]) -> str:
    return min(names, key=len)


def _stored_template(path: Path) -> StoredTemplate | None:
    file = path / "lorry_template.json"
    return StoredTemplate.model_validate_json(file.read_text("utf-8")) if file.is_file() else None


def _check_kind(name: str, config: dict[str, Any]) -> None:
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise Invalid(
            f"adapter {name} is of type {kind}; the engine serves LORA", param="lora_path", code="invalid_adapter"
        )
    for field in _UNSUPPORTED:
        if config.get(field):
            raise Invalid(
                f"adapter {name} uses {field}, which the engine does not serve",
                param="lora_path",
                code="invalid_adapter",
            )


def _scaling(module: str, r: int, config: dict[str, Any]) -> float:
    """PEFT's: alpha / r, or alpha / sqrt(r) with rsLoRA; alpha_pattern overrides by the module's name or its end."""
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            alpha = value
            break
    return float(alpha / math.sqrt(r) if config.get("use_rslora") else alpha / r)


def _weights(name: str, config: dict[str, Any], state: dict[str, torch.Tensor], base: BaseInfo) -> AdapterWeights:
    """Sort the tensors by module and check each against the base. Every tensor has to find its place."""
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in state.items():
        match = _KEY.fullmatch(key.removeprefix(_PREFIX))
        if match is None:
            raise Invalid(
                f"adapter {name}: the engine has no place for {key}", param="lora_path", code="invalid_adapter"
            )
        parts.setdefault(match["module"], {})[match["part"].removeprefix("base_layer.")] = tensor
    weights = AdapterWeights()
    modules = dict(base.model.named_modules())
    for module_name, tensors in parts.items():
        module = modules.get(module_name)
        if not isinstance(module, (nn.Linear, nn.Embedding)):
            raise Conflict(
                f"adapter {name} changes {module_name}, which the engine's base does not have as a linear or embedding layer",
                code="wrong_base",
            )
        _place(
            name,
            module_name,
            module,
            {k: v.to(base.dtype) for k, v in tensors.items()},
            config,
            weights,
            base,
        )
    embed = next((n for n, m in modules.items() if isinstance(m, nn.Embedding)), None)
    head = next((n for n, m in modules.items() if m is base.head), None)
    if config.get("ensure_weight_tying") and embed in weights.full and head is not None and head not in weights.full:
        weights.full[head] = weights.full[embed]
    return weights


def _place(
    name: str,
    module_name: str,
    module: nn.Linear | nn.Embedding,
    tensors: dict[str, torch.Tensor],
    config: dict[str, Any],
    weights: AdapterWeights,
    base: BaseInfo,
) -> None:
    if isinstance(module, nn.Linear):
        fan_in, fan_out = module.in_features, module.out_features
        a, b = tensors.pop("lora_A.weight", None), tensors.pop("lora_B.weight", None)
        r = a.shape[0] if a is not None else 0
        want_a: tuple[int, ...] = (r, fan_in)
    else:
        fan_in, fan_out = module.num_embeddings, module.embedding_dim
        a, b = tensors.pop("lora_embedding_A", None), tensors.pop("lora_embedding_B", None)
        r = a.shape[0] if a is not None else 0
        want_a = (r, fan_in)
    if (a is None) != (b is None):
        raise Invalid(
            f"adapter {name}: {module_name} has one of the two LoRA matrices", param="lora_path", code="invalid_adapter"
        )
    if a is not None and b is not None:
        _check_shape(name, f"{module_name} lora_A", a, want_a)
        _check_shape(name, f"{module_name} lora_B", b, (fan_out, r))
        if isinstance(module, nn.Embedding):
            a = a.t().contiguous()  # looked up by token
        a, b = a.contiguous(), b.t().contiguous().t()  # in memory both rank by rank, as the kernels on a GPU read them
        weights.pairs[module_name] = LoraPair(a, b, _scaling(module_name, r, config))
    if (full := tensors.pop("weight", None)) is not None:
        if not isinstance(module, nn.Embedding) and module is not base.head:
            raise Invalid(
                f"adapter {name} trains {module_name} fully; the engine serves that for embed_tokens and lm_head only",
                param="lora_path",
                code="invalid_adapter",
            )
        _check_shape(
            name, module_name, full, (fan_in, fan_out) if isinstance(module, nn.Embedding) else (fan_out, fan_in)
        )
        weights.full[module_name] = full
    if (bias := tensors.pop("bias", None)) is not None:
        own = getattr(module, "bias", None)
        if own is None:
            raise Conflict(
                f"adapter {name} has a bias for {module_name}; the engine's base has none there", code="wrong_base"
            )
        _check_shape(name, f"{module_name} bias", bias, tuple(own.shape))
        weights.bias[module_name] = bias - own.detach().to(bias)
    if tensors:
        raise Invalid(
            f"adapter {name}: the engine has no place for {module_name} {', '.join(tensors)}",
            param="lora_path",
            code="invalid_adapter",
        )


def _check_shape(name: str, what: str, tensor: torch.Tensor, want: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != want:
        raise Conflict(
            f"adapter {name}: {what} is {list(tensor.shape)}, the engine's base takes {list(want)}", code="wrong_base"
        )


def _tokenizer(path: Path, base: BaseInfo) -> Any:
    own = tokenizer_hash(path)
    if own is None or own == base.tokenizer_hash:
        return base.tokenizer
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(path))
