"""The migrations make the tables that the models describe, on both databases, whoever runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, inspect, text

from service.migrate import config, downgrade, head, is_current, upgrade
from service.models import Base
from tests.conftest import new_database


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


def test_migrating_twice_changes_nothing(fresh: str) -> None:
    upgrade(fresh)
    engine = create_engine(fresh)
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO files VALUES ('file-1', 'a.txt', 'fine-tune', 1, 'x', 1.0)"))
    upgrade(fresh)
    with engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM files")).scalar() == 1
    engine.dispose()


def test_processes_that_migrate_at_once_do_not_collide(fresh: str) -> None:
    command = [sys.executable, "-m", "service.cli", "migrate"]
    env = {**os.environ, "LORRY_DATABASE_URL": fresh, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    processes = [subprocess.Popen(command, env=env, stderr=subprocess.PIPE) for _ in range(3)]
    errors = [p.communicate(timeout=60)[1].decode() for p in processes]
    assert [p.returncode for p in processes] == [0, 0, 0], errors
    assert is_current(fresh)


def test_the_head_that_the_start_check_reads_is_alembic_s() -> None:
    assert head() == ScriptDirectory.from_config(config("sqlite://")).get_current_head()


def test_a_database_without_tables_is_not_current(fresh: str) -> None:
    assert not is_current(fresh)
