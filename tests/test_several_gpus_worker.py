"""Jobs on several devices through a real worker, here without GPUs: two processes on the CPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from service.gpus import check_gpus, gpus_of
from service.settings import Settings
from tests.conftest import new_database
from tests.recipes import cpt_spec, texts
from tests.worker_kit import Host, child_of, gone, host_on, kill

WORKER = ("-m", "service.cli", "worker", "--gpus", "cpu,cpu", "--queues", "gpu")


@pytest.fixture
def host(request: pytest.FixtureRequest, make_settings: Callable[..., Settings], tmp_path: Path) -> Iterator[Host]:
    url = new_database("sqlite", tmp_path, request)
    settings = make_settings(database_url=url, heartbeat_seconds=0.5, heartbeat_timeout_seconds=4, shutdown_seconds=30)
    with host_on(settings, tmp_path / "worker.log") as made:
        yield made


@pytest.fixture
def spec(host: Host, tiny_base: Path, tmp_path: Path) -> dict[str, Any]:
    """A job of two processes, of some seconds of steps."""
    file = host.upload(texts(tmp_path / "rows.jsonl", n=100))
    training = {"max_steps": 40, "eval_steps": 1000, "save_steps": 10, "save_total_limit": 2}
    made = cpt_spec(tiny_base, adapter="two", dataset={"file_id": file, "test_size": 0.05}, training=training)
    return {**made, "resources": {"gpus": 2}}


def ranks_of(pid: int) -> list[int]:
    """Processes that a job's process has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_job_loses_a_rank_and_succeeds_from_its_checkpoint(host: Host, spec: dict[str, Any]) -> None:
    job = host.submit(spec)
    with host.worker(*WORKER) as process:
        host.step(job, 15)
        ranks = ranks_of(child_of(process))
        assert len(ranks) == 2
        kill(ranks[1])
        host.wait(job, lambda row: row.attempt == 2)
        assert all(gone(rank) for rank in ranks)
        row = host.status(job, "succeeded", "failed")
    assert row.status == "succeeded", row.error
    reasons = [run.reason or "" for run in host.runs(job)]
    assert any("rank 1 of 2" in reason and "SIGKILL" in reason for reason in reasons), reasons
    assert host.runs(job)[-1].record["processes"] == 2
    points = host.metrics(job)["train"]
    assert [point["step"] for point in points] == list(range(1, 41))
    log = (host.settings.job_dir(job) / "log.txt").read_text()
    assert "phase verifying" in log


def test_a_killed_process_of_a_job_takes_its_ranks_along(host: Host, spec: dict[str, Any]) -> None:
    job = host.submit(spec)
    with host.worker(*WORKER) as process:
        host.step(job, 3)
        child = child_of(process)
        ranks = ranks_of(child)
        assert len(ranks) == 2
        kill(child)
        assert all(gone(rank) for rank in ranks)
        host.wait(job, lambda row: row.attempt == 2)
        # And a worker that is told to stop has the job back in the queue, with a checkpoint.
        host.step(job, 5)
        ranks = ranks_of(child_of(process))
        process.terminate()
        process.wait(60)
        assert all(gone(rank) for rank in ranks)
    assert host.job(job).status == "queued"


def test_a_job_that_asks_for_more_than_its_worker_has_fails(host: Host, spec: dict[str, Any]) -> None:
    job = host.submit({**spec, "resources": {"gpus": 3}})
    with host.worker(*WORKER):
        row = host.status(job, "succeeded", "failed")
    assert row.status == "failed"
    assert row.error is not None
    assert row.error["code"] == "unsupported"
    assert "asks for 3 GPUs" in row.error["message"]
    assert "has 2" in row.error["message"]


# Which GPUs a worker owns


@pytest.mark.parametrize(
    ("text", "visible", "nodes", "expected"),
    [
        ("0,1", None, 0, ["0", "1"]),
        (" 3 , GPU-1a2b ", "0", 0, ["3", "GPU-1a2b"]),
        ("cpu,cpu", None, 0, ["cpu", "cpu"]),
        ("auto", None, 0, []),
        ("auto", None, 4, ["0", "1", "2", "3"]),
        ("auto", "2,3", 4, ["2", "3"]),
        ("auto", "", 4, []),
    ],
)
def test_the_gpus_of_a_worker(text: str, visible: str | None, nodes: int, expected: list[str], tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    for i in range(nodes):
        (tmp_path / "dev" / f"nvidia{i}").touch()
    (tmp_path / "dev" / "nvidiactl").touch()
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert gpus_of(check_gpus(text), environ, tmp_path) == expected


@pytest.mark.parametrize("text", ["", "all", "0,0", "0,cpu", "-1", "0;1"])
def test_what_names_no_gpus_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        check_gpus(text)


def test_a_job_of_one_gpu_gets_the_workers_first(monkeypatch: pytest.MonkeyPatch) -> None:
    from service.specs import parse_spec
    from worker.devices import take_devices

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    spec = parse_spec(cpt_spec(Path("/x"), resources={"gpus": 1}))
    assert take_devices(spec, Settings(gpus="2,3")) == ["2"]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2"
