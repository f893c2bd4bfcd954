"""The fault suite in short: the same parts, faults, clients and checks as `python -m benchmarks.faults.run`."""

from __future__ import annotations

import os

import pytest

from benchmarks.faults.run import run, show

MINUTES = float(os.environ.get("FAULTS_MINUTES", "2.5"))  # until the last fault; what is queued then still ends
SEED = int(os.environ.get("FAULTS_SEED", "7"))


@pytest.mark.faults
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("database", ["sqlite", "postgres"])
def test_faults_at_random_moments_lose_nothing(database: str) -> None:
    report = run(database, rounds=1000, minutes=MINUTES, seed=SEED)
    show(report)
    assert {check: wrong for check, wrong in report["found"].items() if wrong} == {}
    assert report["rounds"] >= 6
    assert report["trainings"] > 0
    assert report["jobs"]["succeeded"] > 4  # more than the undisturbed ones
