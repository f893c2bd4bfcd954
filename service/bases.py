"""Base models by name: which engine an adapter fits."""

from __future__ import annotations

import re

_QUANTISED = re.compile(r"(-unsloth)?(-bnb-4bit)?$")


def base_key(name: str) -> str:
    """A base model's name without organisation, folder and quantisation: adapters fit all copies of the same weights.

    >>> base_key("unsloth/Llama-3.2-1B-Instruct-unsloth-bnb-4bit")
    'llama-3.2-1b-instruct'
    """
    return _QUANTISED.sub("", name.rstrip("/").rsplit("/", 1)[-1].lower())
