"""Queues by need and by priority: which one a job goes to, and which worker takes it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from rq import Worker
from sqlalchemy import update

from service.cli import main
from service.ids import new_id
from service.jobs import repository
from service.jobs import service as jobs
from service.models import JobRow
from service.queue import JobQueue
from service.queue_names import needs_of, queue_of, queues_of, sees_gpu
from service.reconcile import Watch, after_end, give_back
from service.settings import Settings, get_settings
from tests.conftest import Api, new_database
from tests.steps import cpt, error_of, post, unique
from tests.worker_kit import ROOT, Host, host_on
from worker.run import LorryWorker


@pytest.fixture
def host(request: pytest.FixtureRequest, make_settings: Callable[..., Settings], tmp_path: Path) -> Iterator[Host]:
    url = new_database(getattr(request, "param", "sqlite"), tmp_path, request)
    with host_on(make_settings(database_url=url), tmp_path / "worker.log") as made:
        yield made


both_databases = pytest.mark.parametrize("host", ["sqlite", "postgres"], indirect=True)


def submit(host: Host, need: str, **changes: Any) -> str:
    """A job that needs `need`: any, cpu, gpu or pool:NAME, with :high or :low behind it if its priority is not normal."""
    need, _, priority = need.rpartition(":") if need.endswith((":high", ":low")) else (need, "", "normal")
    pool = need.removeprefix("pool:") if need.startswith("pool:") else None
    resources = {"gpus": {"cpu": 0, "gpu": 1}.get(need), "pool": pool}
    return host.submit(cpt(unique(), resources=resources, priority=priority, **changes))


def on_queues(queue: JobQueue) -> dict[str, list[str]]:
    """Jobs by the name of the queue they are on, without the installation's part of it; empty ones left out."""
    found = {}
    for name in queue.names():
        entries = [e.decode().partition("-")[0] for e in queue.redis.lrange(f"rq:queue:{name}", 0, -1)]
        if entries:
            found[name.removeprefix(queue.name)] = entries
    return found


@contextmanager
def worker(host: Host, queues: str) -> Iterator[None]:
    """`lorry worker --queues …`, a real process."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("LORRY_")}
    for name in ("data_dir", "database_url", "redis_url", "queue"):
        env[f"LORRY_{name.upper()}"] = str(getattr(host.settings, name))
    command = [sys.executable, "-m", "service.cli", "worker", "--queues", queues]
    with open(host.log, "ab") as log:
        process = subprocess.Popen(
            command, env={**env, "PYTHONPATH": str(ROOT)}, stdout=log, stderr=log, cwd=host.settings.data_dir
        )
    try:
        yield
    finally:
        process.terminate()
        process.wait(120)


# Names


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ({}, "lorry"),
        ({"resources": None, "priority": None}, "lorry"),  # as read from a spec stored before there were these
        ({"resources": {"gpus": None, "pool": None}, "priority": "normal"}, "lorry"),
        ({"priority": "high"}, "lorry:high"),
        ({"resources": {"gpus": 0}}, "lorry:cpu"),
        ({"resources": {"gpus": 1}, "priority": "high"}, "lorry:gpu:high"),
        ({"resources": {"gpus": None, "pool": "a100"}, "priority": "low"}, "lorry:pool:a100:low"),
        ({"resources": {"gpus": 1, "pool": "high"}}, "lorry:pool:high"),
    ],
)
def test_a_spec_names_its_queue(spec: dict[str, Any], name: str) -> None:
    assert queue_of("lorry", spec) == name


def test_a_worker_listens_to_all_of_one_priority_before_the_next() -> None:
    assert queues_of("q", ["gpu", "any", "pool:a"]) == [
        "q:gpu:high", "q:high", "q:pool:a:high", "q:gpu", "q", "q:pool:a", "q:gpu:low", "q:low", "q:pool:a:low",
    ]  # fmt: skip


def test_a_worker_s_needs_are_words_in_order() -> None:
    assert needs_of("auto", gpu=False) == ["any", "cpu"]
    assert needs_of("auto", gpu=True) == ["gpu", "any", "cpu"]
    assert needs_of("pool:a100, auto,cpu", gpu=False) == ["pool:a100", "any", "cpu"]
    for wrong in ("", "gpus", "any,,cpu", "pool:", "pool:A", "pool:a:high", "any cpu", "high"):
        with pytest.raises(ValueError, match="none of auto, any, cpu, gpu and pool:NAME"):
            needs_of(wrong, gpu=True)


def test_a_gpu_is_seen_by_its_device_files_unless_it_is_hidden(tmp_path: Path) -> None:
    dev = tmp_path / "dev"
    dev.mkdir()
    for name in ("nvidiactl", "nvidia-uvm", "dxg"):  # of which none is a GPU
        (dev / name).touch()
    assert not sees_gpu({}, tmp_path)
    (dev / "nvidia0").touch()
    assert sees_gpu({}, tmp_path)
    for seen in ("0,1", "GPU-8932f937"):
        assert sees_gpu({"CUDA_VISIBLE_DEVICES": seen, "NVIDIA_VISIBLE_DEVICES": "all"}, tmp_path), seen
    for hidden in ({"CUDA_VISIBLE_DEVICES": ""}, {"CUDA_VISIBLE_DEVICES": "-1"}, {"NVIDIA_VISIBLE_DEVICES": "void"}):
        assert not sees_gpu(hidden, tmp_path), hidden


def test_a_worker_does_not_start_on_words_that_are_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["worker", "--queues", "cpu,gpuu"])
    assert "--queues: 'gpuu' is none of" in capsys.readouterr().err
    monkeypatch.setenv("LORRY_WORKER_QUEUES", "pool:Big")
    get_settings.cache_clear()
    with pytest.raises(SystemExit, match=r"^lorry: LORRY_WORKER_QUEUES: 'pool:Big' is none of"):
        main(["up"])
    for name in ("a:b", "a,b", "", "a b"):  # would be another installation's queue, or two
        with pytest.raises(ValidationError):
            Settings(queue=name, worker_queues="any")


def test_a_queue_without_a_worker_is_told_of_once_it_has_been_so_for_a_while() -> None:
    now = 0.0
    watch = Watch(clock=lambda: now)
    assert watch.unheard(["q:gpu"]) == []
    now = 29.0
    assert watch.unheard(["q:gpu", "q"]) == []
    now = 31.0
    assert watch.unheard(["q:gpu", "q"]) == ["q:gpu"]
    now = 62.0
    assert watch.unheard(["q:gpu", "q"]) == ["q"]
    assert watch.unheard([]) == []  # heard
    assert watch.unheard(["q:gpu"]) == []
    now = 93.0
    assert watch.unheard(["q:gpu"]) == ["q:gpu"]


def test_reconcile_logs_a_queue_without_a_worker_once(
    host: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("service.reconcile._UNHEARD_SECONDS", 0.0)
    submit(host, "pool:a")
    for _ in range(3):
        host.reconcile()
    said = [r.getMessage() for r in caplog.records if "no worker takes jobs" in r.getMessage()]
    assert len(said) == 1
    assert f"{host.queue.name}:pool:a, where 1 wait" in said[0]


# Jobs on them


@both_databases
def test_every_queue_is_filled_again_and_a_job_leaves_the_one_it_is_on(host: Host) -> None:
    needs = ["any", "any:high", "cpu:low", "gpu", "gpu:high", "pool:a", "pool:a:high", "pool:b"]
    made = [(need, submit(host, need)) for need in [*needs, *needs]]
    old = submit(host, "any")
    with host.db.write() as session:  # as it was stored before specs had these fields
        spec = {k: v for k, v in host.job(old).spec.items() if k not in ("resources", "priority")}
        session.execute(update(JobRow).where(JobRow.id == old).values(spec=spec))
    wanted: dict[str, list[str]] = {}
    for need, job in [*made, ("any", old)]:
        wanted.setdefault(f":{need}".replace(":any", ""), []).append(job)
    assert on_queues(host.queue) == wanted
    assert host.queue.length() == len(made) + 1
    everything = {job for _, job in made} | {old}
    host.queue.redis.delete(*(f"rq:queue:{name}" for name in host.queue.names()), "rq:queues")
    assert host.queue.waiting() == set()
    assert set(host.reconcile().enqueued) == everything
    assert on_queues(host.queue) == wanted
    assert host.reconcile().enqueued == []
    host.queue.redis.delete(f"rq:queue:{host.queue.name}:gpu")  # one of them
    assert host.reconcile().enqueued == wanted[":gpu"]
    for ended, need in ((jobs.cancel, ":pool:a:high"), (jobs.pause, ":gpu"), (jobs.cancel, "")):
        job = wanted[need].pop(0)
        ended(host.db, host.queue, job)
        assert on_queues(host.queue) == wanted


def test_jobs_come_back_to_their_own_queue(host: Host) -> None:
    def claim(job: str) -> str:
        run = new_id("run")
        host.queue.remove(job)
        with host.db.write() as session:
            assert repository.claim(session, job, run, "a worker")
        return run

    paused, lost, parent = submit(host, "gpu"), submit(host, "pool:a:low"), submit(host, "cpu")
    child = submit(host, "gpu:high", after=[parent])
    jobs.pause(host.db, host.queue, paused)
    give_back(host.db, host.queue, host.settings, lost, claim(lost), code="worker_lost", reason="gone")
    run = claim(parent)
    assert on_queues(host.queue) == {":pool:a:low": [lost]}
    jobs.resume(host.db, host.queue, paused)
    with host.db.write() as session:
        assert repository.transition(session, parent, ["preparing"], "running", run_id=run)
        assert repository.end_run(session, parent, run, "succeeded")
    after_end(host.db, host.queue, parent)
    assert on_queues(host.queue) == {":pool:a:low": [lost], ":gpu": [paused], ":gpu:high": [child]}


# Workers


def test_a_worker_takes_what_it_serves_the_most_urgent_first_and_nothing_else(host: Host) -> None:
    needs = ["any:low", "any", "cpu", "gpu", "pool:a100:low", "gpu:high", "any:high"]
    made = {need: submit(host, need) for need in needs}
    with host.db.write() as session:  # specs that no run can read: each fails before anything heavy is imported
        for job in made.values():
            spec = {**host.job(job).spec, "of_a_newer_lorry": True}
            session.execute(update(JobRow).where(JobRow.id == job).values(spec=spec))

    def started(names: list[str]) -> list[str]:
        return sorted(names, key=lambda need: host.runs(made[need])[0].started_at)

    with worker(host, "cpu,any"):
        host.status(made["any:low"], "failed")
        assert host.queue.place({"resources": {"gpus": 0}}) == (f"{host.queue.name}:cpu", 1)
        assert host.queue.place({"resources": {"gpus": 1}}) == (f"{host.queue.name}:gpu", 0)
    assert started(["any:low", "any", "cpu", "any:high"]) == ["any:high", "cpu", "any", "any:low"]
    others = ["gpu", "pool:a100:low", "gpu:high"]
    assert [host.job(made[need]).status for need in others] == ["queued"] * 3
    with worker(host, "pool:a100,gpu"):
        host.status(made["pool:a100:low"], "failed")
    assert started(others) == ["gpu:high", "gpu", "pool:a100:low"]


def test_a_worker_is_known_again_to_a_server_that_lost_everything(host: Host) -> None:
    one = LorryWorker(host.settings.model_copy(update={"worker_queues": "pool:a"}))
    one.register_birth()
    names = queues_of(host.queue.name, ["pool:a"])
    assert host.queue.listening() == {one.name: names}
    host.queue.redis.delete(one.key, "rq:workers", *(f"rq:workers:{name}" for name in names))
    assert host.queue.listening() == {}
    one.heartbeat()
    assert host.queue.listening() == {one.name: names}
    one.register_death()
    assert host.queue.listening() == {}


# Over HTTP


def test_a_job_that_no_worker_takes_is_told_of(sqlite_api: Api) -> None:
    api, name = sqlite_api, sqlite_api.queue.name
    gpu = post(api, cpt(unique(), resources={"gpus": 1}))
    usual = post(api, cpt(unique()))
    assert gpu["spec"]["resources"] == {"gpus": 1, "pool": None}
    assert (usual["spec"]["resources"], usual["spec"]["priority"]) == ({"gpus": None, "pool": None}, "normal")
    one = Worker([api.queue.rq], connection=api.queue.redis, name=unique("w"))
    one.register_birth()
    try:
        part = api.http.get("/readyz?parts=workers").json()["parts"]["workers"]
        assert part == {"ok": True, "detail": f"1 registered; none takes jobs from {name}:gpu (1 waiting)"}
        shown = [api.http.get(f"/v1/jobs/{job['id']}").json()["queue"] for job in (gpu, usual)]
        assert shown == [{"name": f"{name}:gpu", "workers": 0}, {"name": name, "workers": 1}]
        metrics = api.http.get("/metrics").text.splitlines()
        for line in (
            f'lorry_queue_length{{queue="{name}:gpu"}} 1.0',
            f'lorry_queue_workers{{queue="{name}:gpu"}} 0.0',
            f'lorry_queue_length{{queue="{name}"}} 1.0',
            f'lorry_queue_workers{{queue="{name}"}} 1.0',
            f'lorry_queue_length{{queue="{name}:low"}} 0.0',
        ):
            assert line in metrics
    finally:
        one.register_death()
    for job in (gpu, usual):
        api.http.post(f"/v1/jobs/{job['id']}/cancel")
        assert api.http.get(f"/v1/jobs/{job['id']}").json()["queue"] is None


@pytest.mark.parametrize(
    ("changes", "code", "param", "says"),
    [
        ({"resources": {"gpus": 65}}, "invalid_value", "resources.gpus", "from 0 to 64"),
        ({"resources": {"gpus": -1}}, "invalid_value", "resources.gpus", "from 0 to 64"),
        ({"resources": {"gpus": True}}, "invalid_value", "resources.gpus", "from 0 to 64"),
        ({"resources": {"gpus": "1"}}, "invalid_value", "resources.gpus", "or null"),
        ({"resources": {"gpus": 1.5}}, "invalid_value", "resources.gpus", "whole number"),
        ({"resources": {"pool": "Big GPUs"}}, "invalid_value", "resources.pool", "small letters"),
        ({"resources": {"pool": "a" * 41}}, "invalid_value", "resources.pool", "1 to 40"),
        ({"resources": {"pool": ""}}, "invalid_value", "resources.pool", "1 to 40"),
        ({"resources": {"gpu": 1}}, "unknown_field", "resources.gpu", "unknown field"),
        ({"resources": "gpu"}, "invalid_value", "resources", "object"),
        ({"priority": "urgent"}, "invalid_value", "priority", "'high', 'normal' or 'low'"),
        ({"priority": None}, "invalid_value", "priority", "'high', 'normal' or 'low'"),
    ],
)
def test_what_names_no_queue_is_refused(
    sqlite_api: Api, changes: dict[str, Any], code: str, param: str, says: str
) -> None:
    for spec in (cpt(unique()), {"kind": "export", "adapter": "a"}):
        answer = sqlite_api.http.post("/v1/jobs", json={**spec, **changes})
        error = error_of(answer)
        assert (answer.status_code, error["code"], error["param"]) == (422, code, param)
        assert says in error["message"]
