"""Types of single fields of a spec, with what each accepts."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from service.queue_names import POOL_NAME, POOL_RULE

# transformers.training_args.OptimizerNames and trainer_utils.SchedulerType, 5.17 (a test compares them), less those
# that need more arguments or packages than a spec can carry.
Optimizer = Literal[
    "adamw_8bit", "adamw_bnb_8bit", "adamw_torch", "adamw_torch_fused", "paged_adamw_32bit", "paged_adamw_8bit",
    "adafactor", "sgd", "adagrad", "rmsprop", "lion_8bit", "lion_32bit", "paged_lion_32bit", "paged_lion_8bit",
    "ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit",
]  # fmt: skip
Scheduler = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
]  # fmt: skip
# llama-quantize's names in lower case (worker/export/gguf.py has what each of them is), and those a LoRA can be stored in.
GGUF_METHODS = (
    "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0", "q4_k_m", "q4_k_s", "q4_1", "q4_0",
    "q3_k_l", "q3_k_m", "q3_k_s", "q2_k", "iq4_nl", "iq4_xs",
)  # fmt: skip
GGUF_LORA_METHODS = ("f32", "f16", "bf16", "q8_0")
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMG]?)B", re.IGNORECASE)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


def check_adapter_name(name: str) -> str:
    """Accept a name that is safe as a folder, a URL segment and an OpenAI model id. Raises ValueError."""
    if not _NAME.fullmatch(name):
        raise ValueError(
            "an adapter's name is 1 to 96 letters, digits, '.', '_' or '-', and starts with a letter or digit"
        )
    return name


def check_adapter_ref(ref: str) -> str:
    """Accept `name` or `name@step`. Raises ValueError."""
    name, at, step = ref.partition("@")
    check_adapter_name(name)
    if at and not step.isdecimal():
        raise ValueError("a checkpoint is named adapter@step, with a whole number as step")
    return ref


_REPO_NAME = re.compile(r"\w|\w[\w.-]{0,94}\w", re.ASCII)


def check_repo_id(repo_id: str) -> str:
    """Accept owner/name by the hub's rules for both (huggingface_hub.utils.validate_repo_id). Raises ValueError."""
    parts = repo_id.split("/")
    if len(parts) != 2 or not all(_REPO_NAME.fullmatch(part) for part in parts):
        raise ValueError(
            "owner/name, each 1 to 96 letters, digits, '-', '_' or '.', neither beginning nor ending with '-' or '.'"
        )
    if "--" in repo_id or ".." in repo_id or repo_id.endswith(".git"):
        raise ValueError("a repository's id holds no '--' and no '..', and does not end with '.git'")
    return repo_id


AdapterName = Annotated[str, AfterValidator(check_adapter_name)]
AdapterRef = Annotated[str, AfterValidator(check_adapter_ref)]
RepoId = Annotated[str, AfterValidator(check_repo_id)]


def check_metadata(metadata: dict[str, str]) -> dict[str, str]:
    """Accept what OpenAI's metadata may hold. Raises ValueError."""
    if len(metadata) > 16:
        raise ValueError("at most 16 pairs")
    for key, value in metadata.items():
        if not 1 <= len(key) <= 64 or len(value) > 512 or "\0" in key + value:
            raise ValueError(f"{key[:64]!r}: keys are 1 to 64 characters, values at most 512, without NUL")
    return metadata


Metadata = Annotated[dict[str, str], AfterValidator(check_metadata)]


MAX_GPUS = 64


def check_gpus(gpus: Any) -> Any:
    """Accept a number of GPUs. Raises ValueError."""
    # True would be taken for 1, "1" and 1.0 too.
    if gpus is not None and (isinstance(gpus, bool) or not isinstance(gpus, int) or not 0 <= gpus <= MAX_GPUS):
        raise ValueError(f"a whole number from 0 to {MAX_GPUS}, or null")
    return gpus


def check_pool_name(name: str) -> str:
    """Accept what can be part of a queue's name. Raises ValueError."""
    if not POOL_NAME.fullmatch(name):
        raise ValueError(f"a pool's name is {POOL_RULE}")
    return name


Gpus = Annotated[
    int | None, BeforeValidator(check_gpus, json_schema_input_type=Annotated[int, Field(ge=0, le=MAX_GPUS)] | None)
]
PoolName = Annotated[str, AfterValidator(check_pool_name)]
Priority = Literal["high", "normal", "low"]
BatchSize = Literal["auto"] | Annotated[int, Field(ge=1, le=4096)]


def size_in_bytes(size: str) -> int:
    """Bytes of e.g. '500MB' or '5GB', in powers of ten as the hub counts. Raises ValueError."""
    found = _SIZE.fullmatch(size)
    if found is None:
        raise ValueError("a number with KB, MB or GB, e.g. '500MB'")
    return int(float(found[1]) * {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}[found[2].upper()])


def check_file_size(size: str) -> str:
    """Accept a size of at least 1MB. Raises ValueError."""
    if size_in_bytes(size) < 1_000_000:
        raise ValueError("at least 1MB")
    return size


def one_or_several(value: Any) -> Any:
    """A name alone is a list of one; names are taken in either case."""
    value = [value] if isinstance(value, str) else value
    return [v.lower() if isinstance(v, str) else v for v in value] if isinstance(value, list) else value


FileSize = Annotated[str, AfterValidator(check_file_size)]
Methods = Annotated[list[str], BeforeValidator(one_or_several)]
