"""Types of single fields of a spec, with what each accepts."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator

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
