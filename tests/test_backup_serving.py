"""A backup taken while a job trains, restored into the other database on another folder: same text, training goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from service.backup import backup
from service.db import Database
from service.jobs import service as jobs
from service.migrate import upgrade
from service.queue import JobQueue
from service.restore import restore
from service.settings import Settings
from tests.conftest import Api, new_database, serve
from tests.recipes import cpt_spec, texts
from tests.serving import KINDS, engine_settings, make_adapter, register, serve_engine
from tests.worker_kit import Host


def host_of(settings: Settings, log: Path) -> Host:
    return Host(settings, Database(settings.sqlalchemy_url), JobQueue(settings.redis_url, settings.queue), log)


def test_a_restored_backup_serves_the_same_text_and_trains_on(
    request: pytest.FixtureRequest, make_settings: Callable[..., Settings], tiny_base: Path, tmp_path: Path
) -> None:
    urls = {kind: new_database(kind, tmp_path, request) for kind in ("sqlite", "postgres")}
    upgrade(urls["sqlite"])
    timing = {"heartbeat_seconds": 0.5, "heartbeat_timeout_seconds": 60}
    with serve_engine(engine_settings(tiny_base)) as engine:
        common: dict[str, Any] = {**timing, "engine_url": engine.url, "base_model": str(tiny_base)}
        here = host_of(make_settings(database_url=urls["sqlite"], **common), tmp_path / "here.log")
        file = here.upload(texts(tmp_path / "rows.jsonl", n=100))
        dataset = {"file_id": file, "test_size": 0.05}
        # Steps without end: however fast they are, it is training when the backup is made.
        training = {
            "max_steps": 1_000_000,
            "logging_steps": 1,
            "eval_steps": 1_000_000,
            "save_steps": 5,
            "save_total_limit": 1000,
        }
        job = here.submit(cpt_spec(tiny_base, adapter="trained", dataset=dataset, training=training))
        ready = make_adapter(tiny_base, here.settings.adapters_dir / "ready", **KINDS["full"])
        register(here.db, "ready", ready, str(tiny_base))
        with here.worker():
            here.step(job, 8, seconds=300)
            report = backup(here.settings, tmp_path / "backup.tar")  # while it trains
            jobs.cancel(here.db, here.queue, job)
            here.status(job, "cancelled", seconds=300)
        assert (report.missing, report.damaged) == ([], [])

        there = host_of(make_settings(database_url=urls["postgres"], **common), tmp_path / "there.log")
        assert restore(there.settings, tmp_path / "backup.tar").requeued == [job]
        refs = ["ready", f"{job}@5"]
        with serve(here.settings) as old, serve(there.settings) as new:
            assert [answers(old, ref) for ref in refs] == [answers(new, ref) for ref in refs]
        for ref in refs:
            assert engine.engine.adapters.get(ref).path.is_relative_to(there.settings.data_dir), "the restored files"
        with there.worker():
            there.status(job, "running", seconds=300)
            there.wait(job, lambda row: resumptions(there, job) != [], seconds=300)
            (resumed,) = resumptions(there, job)
            began = int(resumed.rpartition(" ")[2])
            there.step(job, began + 3, seconds=300)
            jobs.cancel(there.db, there.queue, job)
            row = there.status(job, "cancelled", seconds=300)
    assert row.attempt == 1
    assert began >= 5
    steps = [p["step"] for p in there.metrics(job)["train"]]
    assert steps == list(range(1, len(steps) + 1))
    for host in (here, there):
        host.db.dispose()


def resumptions(host: Host, job: str) -> list[str]:
    return [e.data["message"] for e in host.events(job, "log") if "resumed from the checkpoint" in e.data["message"]]


def answers(api: Api, name: str) -> list[str]:
    """Greedy answers to a few prompts."""
    out = []
    for prompt in ("the cat", "and then", "many"):
        body = {"adapter": name, "prompt": prompt, "max_new_tokens": 24, "temperature": 0}
        answer = api.http.post("/generate", json=body)
        assert answer.status_code == 200, answer.text
        out.append(answer.json()["text"])
    assert any(out)
    return out
