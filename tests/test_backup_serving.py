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
from tests.serving import engine_settings, serve_engine
from tests.worker_kit import Host

LAST = 30


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
        often = {"logging_steps": 1, "eval_steps": 1000, "save_steps": 5, "save_total_limit": 2}
        first = here.submit(cpt_spec(tiny_base, adapter="first", dataset=dataset, training={**often, "max_steps": 4}))
        second = here.submit(
            cpt_spec(tiny_base, adapter="second", dataset=dataset, training={**often, "max_steps": LAST})
        )
        with here.worker():
            here.status(first, "succeeded", seconds=300)
            here.step(second, 8, seconds=300)
            report = backup(here.settings, tmp_path / "backup.tar")
            jobs.cancel(here.db, here.queue, second)
            here.status(second, "cancelled", "succeeded", seconds=300)
        assert (report.missing, report.damaged) == ([], [])

        there = host_of(make_settings(database_url=urls["postgres"], **common), tmp_path / "there.log")
        assert restore(there.settings, tmp_path / "backup.tar").requeued == [second]
        with serve(here.settings) as old, serve(there.settings) as new:
            texts_of = [answers(api, "first") for api in (old, new)]
        assert texts_of[0] == texts_of[1]
        assert engine.engine.adapters.get("first").path.is_relative_to(there.settings.data_dir), "the restored files"
        with there.worker():
            row = there.status(second, "succeeded", "failed", seconds=300)
    assert (row.status, row.attempt) == ("succeeded", 1), row.error
    (resumed,) = [e.data["message"] for e in there.events(second, "log") if "resumed" in e.data["message"]]
    assert int(resumed.rpartition(" ")[2]) >= 5
    assert [p["step"] for p in there.metrics(second)["train"]] == list(range(1, LAST + 1))
    for host in (here, there):
        host.db.dispose()


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
