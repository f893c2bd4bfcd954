"""What an exception amounts to as a job's error. The exceptions are real ones."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch

from service.errors import JobFailure
from worker.progress import finite
from worker.run import describe
from worker.tasks import classify


def test_an_allocation_that_fails_is_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    failure = classify(caught.value)
    assert failure.code == "out_of_memory"
    assert "per_device_train_batch_size" in failure.message
    assert not failure.retry


def test_a_full_disk_is_insufficient_storage() -> None:
    with pytest.raises(OSError, match="No space left") as caught, open("/dev/full", "wb", buffering=0) as full:
        full.write(b"x" * 8192)
    failure = classify(caught.value)
    assert failure.code == "insufficient_storage"
    assert not failure.retry


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small file system")
def test_a_checkpoint_on_a_full_disk_fails_the_job_and_leaves_nothing_half_written(
    tiny_base: Path, tmp_path: Path
) -> None:
    import subprocess

    from tests.recipes import cpt_spec, run_recipe, texts

    rows = texts(tmp_path / "rows.jsonl")
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], check=True)
    try:
        with pytest.raises(Exception) as caught:  # torch, safetensors or the OS: whoever writes first
            run_recipe(cpt_spec(tiny_base), small, file=rows)
        assert classify(caught.value).code == "insufficient_storage", repr(caught.value)
        assert [p.name for p in (small / "run" / "checkpoints").iterdir() if p.name.startswith("checkpoint")] == []
        assert not (small / "out").exists()
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_an_unknown_error_may_be_tried_again_and_names_itself() -> None:
    failure = classify(ZeroDivisionError("division by zero"))
    assert (failure.code, failure.retry) == ("internal_error", True)
    assert "ZeroDivisionError" in failure.message


def test_a_job_failure_stays_what_it_is() -> None:
    failure = JobFailure("invalid_data", "no rows", [{"row": 1, "reason": "empty"}])
    assert classify(failure) is failure


def test_a_wait_status_is_said_in_words() -> None:
    assert "SIGKILL" in describe(9)
    assert "exit code 3" in describe(3 << 8)


def test_a_loss_that_is_no_number_is_reported_as_null() -> None:
    point = {"loss": float("nan"), "grad_norm": float("inf"), "step": 3, "nested": [{"x": -math.inf}, 0.5]}
    assert finite(point) == {"loss": None, "grad_norm": None, "step": 3, "nested": [{"x": None}, 0.5]}
