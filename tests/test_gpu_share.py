"""A job and an engine on one GPU under the policy exclusive: real workers, jobs and engines. The calls need no GPU."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from pydantic import ValidationError

from service.settings import Settings
from tests.conftest import free_port, new_database
from tests.door import door
from tests.recipes import cpt_spec, texts
from tests.serving import EngineServer, engine_settings, serve_engine, until
from tests.test_engine_sleep import LONG, Stream, refused, slow_down, status
from tests.test_worker import long_spec
from tests.worker_kit import Host, child_of, gone, host_on, kill

LEASE = 4.0


@pytest.fixture(scope="module")
def served(tiny_base: Path) -> Iterator[EngineServer]:
    with serve_engine(engine_settings(tiny_base)) as engine:
        yield engine


@pytest.fixture
def engine(served: EngineServer) -> Iterator[EngineServer]:
    until(lambda: status(served) == "ok" and served.idle())
    yield served
    until(lambda: status(served) == "ok" and served.idle(), 30)


@pytest.fixture
def make_host(
    request: pytest.FixtureRequest, make_settings: Callable[..., Settings], tmp_path: Path
) -> Callable[..., AbstractContextManager[Host]]:
    @contextmanager
    def make(*engines: str) -> Iterator[Host]:
        settings = make_settings(
            database_url=new_database("sqlite", tmp_path, request),
            heartbeat_seconds=0.5,
            heartbeat_timeout_seconds=4,
            shutdown_seconds=20,
            gpu_policy="exclusive",
            gpu_engines=",".join(engines),
            gpu_grace_seconds=0,
            gpu_lease_seconds=LEASE,
        )
        with host_on(settings, tmp_path / "worker.log") as host:
            yield host

    return make


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return texts(tmp_path / "cpt.jsonl", n=100)


def sleeps(engine: EngineServer) -> int:
    return int(engine.engine.metrics.sleeps._value.get())


def log_of(host: Host, job: str) -> str:
    return (host.settings.job_dir(job) / "log.txt").read_text()


def test_a_stream_waits_for_a_job_and_others_are_told_when_to_come_back(
    engine: EngineServer, make_host: Any, tiny_base: Path, rows: Path
) -> None:
    expected = engine.complete(**{**LONG, "max_tokens": 200})["choices"][0]["text"]
    before = sleeps(engine)
    with make_host(engine.url) as host, host.worker():
        with pytest.MonkeyPatch.context() as patch:
            slow_down(engine, patch, 0.4)
            stream = Stream(engine, max_tokens=200)
            until(lambda: len(stream.pieces) > 2)
            job = host.submit(long_spec(tiny_base, host.upload(rows), "busy"))
            host.step(job, 2)
            assert status(engine) == "asleep"
        pieces = len(stream.pieces)
        answer = refused(engine)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_asleep")
        assert int(answer.headers["retry-after"]) >= 5
        host.step(job, 20)
        assert len(stream.pieces) == pieces
        row = host.status(job, "succeeded", "failed")
        assert row.status == "succeeded", row.error
        assert stream.text() == expected
        assert stream.error is None
        until(lambda: status(engine) == "ok", LEASE)
    assert refused(engine).status_code == 200
    assert sleeps(engine) == before + 1
    log = log_of(host, job)
    assert "has given its memory up" in log
    assert log.index("phase data") < log.index("has given its memory up") < log.index("phase training"), "no sooner"


def test_the_lease_of_a_killed_worker_and_its_job_runs_out(
    engine: EngineServer, make_host: Any, tiny_base: Path, rows: Path
) -> None:
    with make_host(engine.url) as host, host.worker() as process:
        job = host.submit(long_spec(tiny_base, host.upload(rows), "killed"))
        host.step(job, 3)
        child = child_of(process)
        kill(process.pid)
        kill(child)
        assert gone(child)
        assert status(engine) == "asleep"
        until(lambda: status(engine) == "ok", LEASE + 10)
        assert engine.complete(prompt="x", max_tokens=1)


def test_the_lease_ends_with_a_killed_child_and_the_next_attempt_takes_another(
    engine: EngineServer, make_host: Any, tiny_base: Path, rows: Path
) -> None:
    before = sleeps(engine)
    with make_host(engine.url) as host, host.worker() as process:
        job = host.submit(long_spec(tiny_base, host.upload(rows), "again", max_steps=60))
        host.step(job, 12)
        kill(child_of(process))
        row = host.status(job, "succeeded", "failed")
        assert (row.status, row.attempt) == ("succeeded", 2)
        until(lambda: status(engine) == "ok", LEASE)
    assert sleeps(engine) == before + 2


def test_with_two_jobs_at_once_the_engine_sleeps_until_both_have_ended(
    engine: EngineServer, make_host: Any, tiny_base: Path, rows: Path
) -> None:
    before = sleeps(engine)
    with make_host(engine.url) as host, host.worker(), host.worker():
        file = host.upload(rows)
        jobs = [
            host.submit(long_spec(tiny_base, file, f"job-{n}", max_steps=steps)) for n, steps in ((0, 120), (1, 400))
        ]
        until(lambda: len(engine.engine.sleep._leases) == 2, 120)
        host.status(jobs[0], "succeeded")
        until(lambda: len(engine.engine.sleep._leases) == 1, LEASE)
        assert host.job(jobs[1]).status == "running"
        assert status(engine) == "asleep"
        host.status(jobs[1], "succeeded")
        until(lambda: status(engine) == "ok", LEASE)
    assert sleeps(engine) == before + 1


@contextmanager
def bare_server() -> Iterator[str]:
    """As vLLM without its development mode, in what matters here: it has no call for its memory."""
    app = FastAPI()
    app.get("/health")(lambda: None)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


def test_engines_that_are_away_or_know_no_such_call_cost_a_log_line(
    make_host: Any, tiny_base: Path, rows: Path
) -> None:
    away = f"http://127.0.0.1:{free_port()}"
    with bare_server() as bare, make_host(away, bare) as host, host.worker():
        job = host.submit(cpt_spec(tiny_base, dataset={"file_id": host.upload(rows)}))
        row = host.status(job, "succeeded", "failed")
        assert row.status == "succeeded", row.error
        log = log_of(host, job)
    assert (
        log.count(f"the engine at {away.removeprefix('http://')} does not answer (ConnectError); the job goes on") == 1
    )
    assert log.count(f"the engine at {bare.removeprefix('http://')} has no call to give its memory up") == 1


def test_an_engine_that_comes_up_during_a_job_is_asked_then(
    engine: EngineServer, make_host: Any, tiny_base: Path, rows: Path
) -> None:
    with door(engine.url) as way, make_host(way.url) as host, host.worker():
        way.shut()
        job = host.submit(long_spec(tiny_base, host.upload(rows), "late", max_steps=400))
        host.step(job, 2)
        assert status(engine) == "ok"
        way.open()
        until(lambda: status(engine) == "asleep", LEASE)
        assert host.job(job).status == "running"
        host.status(job, "succeeded")
        until(lambda: status(engine) == "ok", LEASE)


def test_engines_of_the_worker_s_gpu_are_those_on_loopback_unless_said_otherwise() -> None:
    mixed = "http://127.0.0.1:8322, http://gpu2:8322,http://localhost:1,http://[::1]:8322,http://10.0.0.7:8322"
    assert Settings(engine_url=mixed).gpu_engine_urls == [
        "http://127.0.0.1:8322",
        "http://localhost:1",
        "http://[::1]:8322",
    ]
    assert Settings(engine_url=mixed, gpu_engines="http://engine:8322").gpu_engine_urls == ["http://engine:8322"]
    assert Settings(engine_url=mixed, gpu_engines="").gpu_engine_urls == []
    assert Settings().gpu_policy == "shared"
    with pytest.raises(ValidationError, match="engine:8322 is named twice"):
        Settings(gpu_engines="http://engine:8322,http://engine:8322/")
    with pytest.raises(ValidationError, match="is no engine's URL"):
        Settings(gpu_engines="engine")


def test_a_job_under_the_shared_policy_leaves_the_engine_alone(
    engine: EngineServer, make_host: Any, tiny_base: Path, rows: Path
) -> None:
    before = sleeps(engine)
    with make_host(engine.url) as made:
        settings = made.settings.model_copy(update={"gpu_policy": "shared"})
        host = Host(settings, made.db, made.queue, made.log)
        with host.worker():
            job = host.submit(cpt_spec(tiny_base, dataset={"file_id": host.upload(rows)}))
            while host.job(job).status not in ("succeeded", "failed"):
                assert engine.complete(prompt="x", max_tokens=1)
                time.sleep(0.05)
        assert host.job(job).status == "succeeded"
    assert sleeps(engine) == before
