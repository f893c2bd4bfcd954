"""The migrations make the tables that the models describe, on both databases, whoever runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import JSON, Connection, MetaData, create_engine, event, inspect, select

from service import cli
from service.locks import exclusive
from service.migrate import config, downgrade, head, is_current, upgrade
from service.models import Base
from service.settings import Settings, get_settings
from tests.conftest import new_database, serve

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(params=["sqlite", "postgres"])
def fresh(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return new_database(request.param, tmp_path, request)


def tables(url: str) -> set[str]:
    engine = create_engine(url)
    names = set(inspect(engine).get_table_names())
    engine.dispose()
    return names - {"alembic_version"}


def test_the_migrated_schema_is_the_models(fresh: str) -> None:
    upgrade(fresh)
    engine = create_engine(fresh)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []
    engine.dispose()
    assert tables(fresh) == set(Base.metadata.tables)


def test_constraints_carry_the_convention_s_names(fresh: str) -> None:
    """A later migration can then name them on both databases."""
    upgrade(fresh)
    engine = create_engine(fresh)
    found = inspect(engine)
    for table in Base.metadata.tables.values():
        assert found.get_pk_constraint(table.name)["name"] == f"pk_{table.name}"
        assert {i["name"] for i in found.get_indexes(table.name) if not i.get("duplicates_constraint")} == {
            i.name for i in table.indexes
        }
    assert [u["name"] for u in found.get_unique_constraints("jobs")] == ["uq_jobs_idempotency_key"]
    engine.dispose()


def test_every_migration_goes_down_and_up_again(fresh: str) -> None:
    upgrade(fresh)
    revisions = [r.revision for r in ScriptDirectory.from_config(config(fresh)).walk_revisions()]
    for _ in revisions:
        downgrade(fresh, "-1")
    assert tables(fresh) == set()
    for revision in reversed(revisions):
        assert not is_current(fresh)
        upgrade(fresh, revision)
    assert is_current(fresh)
    assert tables(fresh) == set(Base.metadata.tables)


def test_processes_that_migrate_at_once_do_not_collide(fresh: str) -> None:
    migrate = [sys.executable, "-m", "service.cli", "migrate"]
    env = {**os.environ, "LORRY_DATABASE_URL": fresh, "PYTHONPATH": str(ROOT)}
    processes = [subprocess.Popen(migrate, env=env, stderr=subprocess.PIPE) for _ in range(3)]
    errors = [p.communicate(timeout=120)[1].decode() for p in processes]
    assert [p.returncode for p in processes] == [0, 0, 0], errors
    assert is_current(fresh)


FIRST = "20261124_0001"
TEMPLATE = {"kind": "prompt", "prompt": "{text}", "eos": "</s>", "stop": ["</s>"]}
JOB = "job_019e00000000000000000001"
ROWS: dict[str, list[dict[str, Any]]] = {
    # As lorry 0.1.0 wrote them at the first revision, every column filled; older rows must stay readable for good.
    "files": [
        {
            "id": "file-019e00000000000000000001", "filename": "zeilen.jsonl", "purpose": "fine-tune",
            "bytes": 3_000_000_000, "sha256": "0" * 64, "created_at": 1764000000.25,
        }
    ],
    "jobs": [
        {
            "id": JOB, "kind": "cpt", "status": "succeeded", "adapter": "erster", "attempt": 2,
            "spec": {
                "kind": "cpt", "adapter": "erster", "after": [], "push_to_hub": None,
                "model": {"name": "org/base", "revision": None}, "lora": {"r": 8},
                "dataset": {"file_id": "file-019e00000000000000000001", "path": None, "template": {"prompt": "{text}"}},
                "training": {"max_steps": 3},
            },
            "after": [], "idempotency_key": "schlüssel", "idempotency_hash": "1" * 64, "control": None, "run_id": None,
            "worker": None, "heartbeat_at": None, "event_seq": 2,
            "progress": {"step": 3, "total_steps": 3, "phase": "verifying"}, "result": {"eval_loss": 1.25},
            "error": None, "lineage": {"base": "org/base", "parent": None, "jobs": []}, "created_at": 1764000001.5,
            "started_at": 1764000002.5, "finished_at": 1764000003.5,
        },
        {
            "id": "job_019e00000000000000000002", "kind": "export", "status": "failed", "adapter": "erster", "attempt": 3,
            "spec": {"kind": "export", "adapter": "erster", "format": "lora"}, "after": [JOB], "idempotency_key": None,
            "idempotency_hash": None, "control": "cancel", "run_id": "run_2", "worker": "w", "heartbeat_at": 1764000004.0,
            "event_seq": 0, "progress": {}, "result": {},
            "error": {"code": "internal_error", "message": "kaputt", "rows": []}, "lineage": {}, "created_at": 1764000004.0,
            "started_at": None, "finished_at": 1764000005.0,
        },
    ],
    "runs": [
        {
            "id": "run_019e00000000000000000001", "job_id": JOB, "attempt": 2, "worker": "host.1", "outcome": "succeeded",
            "reason": None, "record": {"device": {"type": "cpu"}}, "started_at": 1764000002.5, "finished_at": 1764000003.5,
        }
    ],
    "events": [
        {
            "job_id": JOB, "seq": seq, "type": "status", "created_at": 1764000001.5 + seq,
            "data": {"status": status, "attempt": 2, "reason": None, "error": None},
        }
        for seq, status in ((1, "queued"), (2, "succeeded"))
    ],
    "metrics": [
        {"job_id": JOB, "split": "train", "step": 1, "data": {"epoch": 0.5, "loss": 2.5}},
        {"job_id": JOB, "split": "eval", "step": 1, "data": {"epoch": 0.5, "eval_loss": 2.25}},
    ],
    "checkpoints": [
        {
            "job_id": JOB, "step": 3, "path": "/data/jobs/x/checkpoints/checkpoint-3", "loss": 2.5, "eval_loss": None,
            "bytes": 5_000_000_000, "created_at": 1764000003.0,
        }
    ],
    "adapters": [
        {
            "name": "erster", "job_id": JOB, "ready": True, "kind": "cpt", "base": "org/base", "path": "/data/adapters/x",
            "step": 3, "config": {"r": 8, "lora_alpha": 16, "use_rslora": True, "target_modules": ["q_proj"],
            "train_embeddings": False}, "template": TEMPLATE, "parent": None, "bytes": 4_000_000_000, "pinned": True,
            "eval_loss": 1.25, "created_at": 1764000001.5,
        }
    ],
    "artifacts": [
        {"job_id": "job_019e00000000000000000002", "path": "a/b.safetensors", "bytes": 3_000_000_000, "sha256": "2" * 64}
    ],
}  # fmt: skip


def reflected(connection: Connection) -> MetaData:
    """The tables as the database has them, not as the models say."""
    metadata = MetaData()

    @event.listens_for(metadata, "column_reflect")
    def _null_is_null(inspector: Any, table: Any, column: dict[str, Any]) -> None:
        if isinstance(column["type"], JSON):
            column["type"] = JSON(none_as_null=True)

    metadata.reflect(connection)
    return metadata


def fill(url: str) -> None:
    engine = create_engine(url)
    with engine.begin() as connection:
        metadata = reflected(connection)
        assert set(ROWS) == set(metadata.tables) - {"alembic_version"}
        for name, rows in ROWS.items():
            assert all(set(row) == set(metadata.tables[name].columns.keys()) for row in rows), name
            connection.execute(metadata.tables[name].insert(), rows)
    engine.dispose()


def stored(url: str) -> dict[str, list[dict[str, Any]]]:
    """What the columns of the first revision hold."""
    engine = create_engine(url)
    with engine.connect() as connection:
        metadata = reflected(connection)
        found = {}
        for name, rows in ROWS.items():
            table = metadata.tables[name]
            query = select(*(table.c[c] for c in rows[0])).order_by(*table.primary_key)
            found[name] = [dict(row) for row in connection.execute(query).mappings()]
    engine.dispose()
    return found


def expected() -> dict[str, list[dict[str, Any]]]:
    keys = {"events": ("job_id", "seq"), "metrics": ("job_id", "split")}
    return {n: sorted(rows, key=lambda r: [r[k] for k in keys.get(n, [next(iter(r))])]) for n, rows in ROWS.items()}


def test_data_of_the_first_revision_go_up_and_down_and_stay_readable(
    fresh: str, make_settings: Callable[..., Settings]
) -> None:
    upgrade(fresh, FIRST)
    fill(fresh)
    upgrade(fresh)
    assert stored(fresh) == expected()
    with serve(make_settings(database_url=fresh)) as api:
        get = api.http.get
        job = get(f"/v1/jobs/{JOB}").json()
        assert (job["status"], job["attempt"], job["result"]) == ("succeeded", 2, {"eval_loss": 1.25})
        assert job["runs"][0]["record"] == {"device": {"type": "cpu"}}
        assert get(f"/v1/jobs/{JOB}/metrics").json()["eval"] == [{"step": 1, "epoch": 0.5, "eval_loss": 2.25}]
        events = get(f"/v1/jobs/{JOB}/events", headers={"Accept": "application/json"}).json()["data"]
        assert [e["data"]["status"] for e in events] == ["queued", "succeeded"]
        assert [c["bytes"] for c in get(f"/v1/jobs/{JOB}/checkpoints").json()["data"]] == [5_000_000_000]
        assert get("/v1/adapters/erster").json()["bytes"] == 4_000_000_000
        assert get("/v1/files/file-019e00000000000000000001").json()["filename"] == "zeilen.jsonl"
        failed = get("/v1/jobs/job_019e00000000000000000002").json()
        assert failed["error"]["message"] == "kaputt"
        assert get("/v1/jobs/job_019e00000000000000000002/artifacts").json()["data"][0]["bytes"] == 3_000_000_000
    downgrade(fresh, FIRST)
    assert stored(fresh) == expected()


MIGRATION = """
import sqlalchemy as sa
from alembic import op

revision = "29991231_0001"
down_revision = "{head}"


def upgrade() -> None:
    # On SQLite both make the tables anew, by copying: rows that refer to them must live through it.
    with op.batch_alter_table("jobs", recreate="auto") as batch:
        batch.add_column(sa.Column("label", sa.String(20), nullable=False, server_default="none"))
        batch.alter_column("worker", type_=sa.Text())
        batch.create_index(batch.f("ix_jobs_label"), ["label"])
    op.execute("UPDATE jobs SET label = kind")
    if {fails}:
        raise RuntimeError("half-way")


def downgrade() -> None:
    with op.batch_alter_table("jobs") as batch:
        batch.drop_index(batch.f("ix_jobs_label"))
        batch.alter_column("worker", type_=sa.String(255))
        batch.drop_column("label")
"""


def next_version(url: str, folder: Path, *, fails: bool = False) -> Config:
    """Alembic's configuration with one migration more than lorry has: what a next version might bring."""
    folder.mkdir(exist_ok=True)
    (folder / "next.py").write_text(MIGRATION.format(head=head(), fails=fails))
    cfg = config(url)
    lorry = Path(ScriptDirectory.from_config(cfg).versions)
    cfg.set_main_option("path_separator", "newline")
    cfg.set_main_option("version_locations", f"{lorry}\n{folder}")
    return cfg


def columns(url: str) -> set[str]:
    engine = create_engine(url)
    names = {c["name"] for c in inspect(engine).get_columns("jobs")}
    engine.dispose()
    return names


def test_a_later_migration_that_remakes_a_table_keeps_what_refers_to_it(fresh: str, tmp_path: Path) -> None:
    upgrade(fresh, FIRST)
    fill(fresh)
    upgrade(fresh)
    cfg = next_version(fresh, tmp_path / "versions")
    command.upgrade(cfg, "head")
    assert "label" in columns(fresh)
    assert stored(fresh) == expected()
    assert not is_current(fresh)
    with pytest.raises(CommandError, match="29991231_0001, which this lorry does not know"):
        upgrade(fresh)
    command.downgrade(cfg, head())
    assert "label" not in columns(fresh)
    assert stored(fresh) == expected()
    engine = create_engine(fresh)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []
    engine.dispose()


def test_a_migration_that_fails_half_way_changes_nothing(fresh: str, tmp_path: Path) -> None:
    upgrade(fresh)
    fill(fresh)
    with pytest.raises(RuntimeError, match="half-way"):
        command.upgrade(next_version(fresh, tmp_path / "versions", fails=True), "head")
    assert is_current(fresh)
    assert "label" not in columns(fresh)
    assert stored(fresh) == expected()
    command.upgrade(next_version(fresh, tmp_path / "versions"), "head")
    assert "label" in columns(fresh)


def test_an_api_that_starts_during_a_migration_says_what_to_do(tmp_path: Path) -> None:
    """An API never migrates: it starts on a database that is ready, or says that it is not."""
    fresh = f"sqlite:///{tmp_path / 'fresh.db'}"
    env = {**os.environ, "LORRY_DATABASE_URL": fresh, "PYTHONPATH": str(ROOT), "LORRY_DATA_DIR": str(tmp_path)}
    with exclusive(fresh, "migrate"):
        done = subprocess.run(
            [sys.executable, "-m", "service.cli", "api"],
            env=env,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 1
    assert "run `lorry migrate`" in done.stderr


def test_the_command_moves_to_a_revision_that_is_named(
    fresh: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LORRY_DATABASE_URL", fresh)
    get_settings.cache_clear()
    try:
        cli.main(["migrate"])
        assert "at the newest revision" in capsys.readouterr().out
        cli.main(["migrate", "--to", FIRST])
        assert tables(fresh) == set(Base.metadata.tables)
        with pytest.raises(SystemExit, match="no revision 'nonsense'"):
            cli.main(["migrate", "--to", "nonsense"])
    finally:
        get_settings.cache_clear()


def test_the_head_that_the_start_check_reads_is_alembic_s() -> None:
    assert head() == ScriptDirectory.from_config(config("sqlite://")).get_current_head()


def test_a_database_without_tables_is_not_current(fresh: str) -> None:
    assert not is_current(fresh)
