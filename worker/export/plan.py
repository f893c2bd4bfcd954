"""What a merged model will consist of: which tensor of the base gets which update. No tensor is computed here.

Every tensor of the adapter is used exactly once and every tensor of the base written exactly once, or it fails.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from service.errors import JobFailure
from worker import adapter_io
from worker.export.weights import HALF, BaseWeights, Stored

_PREFIX = "base_model.model."
_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
# Forms of LoRA that change more than W + s·B·A; PEFT's default for each is false or empty.
_OTHER = (
    "use_dora", "fan_in_fan_out", "trainable_token_indices", "alora_invocation_tokens", "use_qalora", "layer_replication",
    "lora_bias", "corda_config", "arrow_config", "target_parameters", "ensure_weight_tying", "megatron_config",
)  # fmt: skip


@dataclass(frozen=True)
class Lora:
    """Keys of A [r, in] and B [out, r] in the adapter's file; the update is scaling · B·A."""

    a: str
    b: str
    scaling: float


@dataclass(frozen=True)
class Planned:
    """A tensor of the merged model: a base tensor (`source`) with an update, or a trained one (`trained`) in its place."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    source: str | None = None
    lora: Lora | None = None
    trained: str | None = None
    linear: bool = False  # the weight of a linear layer that NF4 may hold: not the output embedding


@dataclass(frozen=True)
class Plan:
    """The merged model's tensors in the base's order, and whether a tied base became untied."""

    tensors: list[Planned]
    untied: bool
    tied: bool  # still tied, the output embedding is not written


@dataclass(frozen=True)
class Skeleton:
    """The model's structure, made without memory: shapes of its parameters, its linear layers, what is tied to what."""

    shapes: dict[str, tuple[int, ...]]
    linear: frozenset[str]  # weights of the nn.Linear layers, less those of `kept`
    tied: dict[str, str]  # target → source, e.g. lm_head.weight → model.embed_tokens.weight
    kept: frozenset[
        str
    ]  # linear layers that stay in 16 bits in a 4-bit model: the output embedding, and what `keep` named


def skeleton(
    base: BaseWeights, *, trust_remote_code: bool, token: str | None = None, keep: list[str] | None = None
) -> Skeleton:
    """Build the model of a config.json on torch's meta device; `keep` are bitsandbytes' llm_int8_skip_modules.

    Raises JobFailure("unsupported").
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.quantizers.quantizers_utils import should_convert_module

    try:
        config = AutoConfig.from_pretrained(
            base.name, revision=base.revision, token=token, trust_remote_code=trust_remote_code
        )
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise JobFailure(
            "unsupported", f"the base is no causal language model that transformers knows: {reason}"
        ) from error
    head = model.get_output_embeddings()
    layers = {n: m for n, m in model.named_modules() if type(m) is torch.nn.Linear}
    kept = {n for n, m in layers.items() if m is head or not should_convert_module(n, keep or None)}
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    return Skeleton(shapes, frozenset(f"{n}.weight" for n in layers if n not in kept), tied, frozenset(kept))


def plan_merge(base: BaseWeights, adapter: Path, model: Skeleton, *, dtype: torch.dtype | None = None) -> Plan:
    """Decide the merged model's tensors; each keeps its 16-bit type, those of a base in 32 bits become bfloat16.

    `dtype` stores every floating tensor in that type instead. Raises JobFailure: unsupported for another kind of
    adapter, export_mismatch (naming tensors) for one that does not fit the base.
    """
    config = json.loads((adapter / adapter_io.CONFIG).read_text("utf-8"))
    loras, trained, shapes = read_adapter(adapter, config)
    whole = base.dtype in HALF

    def stored_as(t: Stored) -> torch.dtype:
        if not t.dtype.is_floating_point:
            return t.dtype
        if dtype is not None:
            return dtype
        return t.dtype if whole else torch.bfloat16

    problems: list[str] = []
    tensors: list[Planned] = []
    ties = _ties(base, model, trained)
    for t in base.tensors.values():
        if t.name in ties.dropped:
            continue
        lora, replaced = loras.pop(t.name, None), trained.pop(t.name, None)
        if lora is not None:
            (r, columns), (rows, _) = shapes[lora.a], shapes[lora.b]
            if (rows, columns) != t.shape or shapes[lora.b][1] != r or replaced:
                problems.append(f"{t.name}: base {list(t.shape)}, LoRA {[rows, columns]} of rank {r}")
        if replaced is not None and shapes[replaced] != t.shape:
            problems.append(f"{t.name}: base {list(t.shape)}, trained {list(shapes[replaced])}")
        linear = t.name in model.linear and len(t.shape) == 2
        tensors.append(Planned(t.name, t.shape, stored_as(t), t.name, lora, replaced, linear))
        for name in ties.added.get(t.name, ()):  # an output embedding that the tied base does not store
            key = trained.pop(name, None)
            if key is not None and shapes[key] != t.shape:
                problems.append(f"{name}: base {list(t.shape)}, trained {list(shapes[key])}")
            tensors.append(Planned(name, t.shape, stored_as(t), None if key else t.name, None, key))
    problems += [f"{name}: not among the base's tensors" for name in [*loras, *trained]]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise JobFailure("export_mismatch", f"the adapter does not fit the base: {'; '.join(problems[:5])}{more}")
    return Plan(tensors, ties.untied, bool(model.tied) and not ties.untied)


def read_adapter(
    adapter: Path, config: dict[str, Any]
) -> tuple[dict[str, Lora], dict[str, str], dict[str, tuple[int, ...]]]:
    """The adapter's tensors by the base tensor they belong to: LoRA pairs, and keys of tensors trained in whole.

    Also the shape of each key. Raises JobFailure for what is neither.
    """
    from peft.utils.other import get_pattern_key

    other = [name for name in _OTHER if config.get(name)]
    if config.get("peft_type") != "LORA" or other:
        what = ", ".join(other) or str(config.get("peft_type"))
        raise JobFailure("unsupported", f"the adapter uses {what}, which cannot be merged here")
    with safe_open(adapter / adapter_io.WEIGHTS, framework="pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    sides: dict[str, dict[str, str]] = {}
    trained: dict[str, str] = {}
    for key in shapes:
        name = key.removeprefix(_PREFIX)
        if match := _LORA.fullmatch(name):
            sides.setdefault(match["module"], {})[match["side"]] = key
        elif ".lora_" in name or not name.endswith((".weight", ".bias")):
            raise JobFailure("unsupported", f"the adapter has {key}, which is no LoRA matrix of a linear layer")
        else:
            trained[name.replace(".base_layer.", ".")] = key
    loras: dict[str, Lora] = {}
    for module, pair in sides.items():
        if set(pair) != {"A", "B"}:
            raise JobFailure("export_mismatch", f"the adapter has only one of the two matrices of {module}")
        rank = _pattern(config, "rank_pattern", module, config["r"], get_pattern_key)
        alpha = _pattern(config, "alpha_pattern", module, config["lora_alpha"], get_pattern_key)
        if shapes[pair["A"]][0] != rank:
            raise JobFailure(
                "export_mismatch", f"{module}: rank {shapes[pair['A']][0]} in the file, {rank} in adapter_config.json"
            )
        scaling = adapter_io.scaling({**config, "r": rank, "lora_alpha": alpha})
        loras[f"{module}.weight"] = Lora(pair["A"], pair["B"], scaling)
    return loras, trained, shapes


def _pattern(config: dict[str, Any], field: str, module: str, default: Any, match: Any) -> Any:
    patterns = config.get(field) or {}
    return patterns.get(match(patterns.keys(), module), default)


@dataclass(frozen=True)
class _Ties:
    dropped: frozenset[str]  # base tensors not written: copies of what they are tied to
    added: dict[str, list[str]]  # base tensor → tensors written after it that the base does not store
    untied: bool


def _ties(base: BaseWeights, model: Skeleton, trained: dict[str, str]) -> _Ties:
    """What becomes of tied tensors: trained apart they are two, else they stay one, written once."""
    dropped: set[str] = set()
    added: dict[str, list[str]] = {}
    untied = False
    cpu = torch.device("cpu")
    for target, source in model.tied.items():
        there = [name for name in (source, target) if name in base.tensors]
        if target in trained or source in trained:
            untied = True
            if len(there) == 1:
                added.setdefault(there[0], []).append(target if there[0] == source else source)
        elif len(there) == 2:
            # As transformers loads it: tied only if the two are the same.
            if torch.equal(base.read(source, cpu), base.read(target, cpu)):
                dropped.add(target)
            else:
                untied = True
    return _Ties(frozenset(dropped), added, untied)


def same_model(one: BaseWeights, other: BaseWeights) -> list[str]:
    """In what `other` differs from `one` as a model to merge the same adapter into: architecture, names, shapes."""
    out = [
        f"{key} is {other.config.get(key)!r}, not {one.config.get(key)!r}"
        for key in ("model_type", "architectures", "vocab_size", "num_hidden_layers", "num_attention_heads")
        if one.config.get(key) != other.config.get(key)
    ]
    for name in sorted(one.tensors.keys() | other.tensors.keys()):
        a, b = one.tensors.get(name), other.tensors.get(name)
        if name.endswith("lm_head.weight") and (a is None or b is None):
            continue  # tied: some copies store it, some do not
        if a is None or b is None:
            out.append(f"{name} is only in {'the trained base' if a else 'the one named'}")
        elif a.shape != b.shape:
            out.append(f"{name} is {list(b.shape)}, not {list(a.shape)}")
    return out
