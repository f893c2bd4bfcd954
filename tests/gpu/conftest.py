"""What the GPU's tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.recipes import texts
from tests.tiny import make_tiny_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wider than the CPU tests' model: the fused kernels want heads of 64, and an MLP wider than the model."""
    folder = tmp_path_factory.mktemp("gpu") / "base"
    make_tiny_base(folder, hidden=256, intermediate=512)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return texts(tmp_path_factory.mktemp("rows") / "cpt.jsonl", n=100)
