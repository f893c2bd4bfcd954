"""Backups: what is in them, what they refuse, and that they are consistent while everything runs."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, select

from service import cli
from service.archive import BackupError
from service.backup import backup
from service.files.service import delete as delete_file
from service.ids import new_id
from service.migrate import is_current
from service.models import AdapterRow, Base, CheckpointRow, FileRow
from service.queue import JobQueue
from service.reconcile import reconcile
from service.restore import check, restore
from service.retention import RESUME_FILES
from service.settings import Settings, get_settings
from tests.conftest import Api, new_database, serve
from tests.steps import cpt, ift, post, start, succeed, unique

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Filled:
    """An installation with something of everything."""

    api: Api
    file_id: str
    job: str  # succeeded; its adapter is `name`, its checkpoint 10 is named by `waiting`
    name: str
    running: str
    waiting: str
    export: str


def whole(folder: Path, *more: str) -> int:
    """A checkpoint's or adapter's folder, as far as a backup looks into it; its size."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "lorry_template.json").write_text(json.dumps({"kind": "prompt", "prompt": "{text}", "eos": "</s>"}))
    for name in ("adapter_config.json", "adapter_model.safetensors", *more):
        (folder / name).write_bytes(os.urandom(500))
    return sum(p.stat().st_size for p in folder.iterdir())


def add_checkpoint(api: Api, job_id: str, step: int) -> Path:
    path = api.settings.job_dir(job_id) / "checkpoints" / f"checkpoint-{step}"
    size = whole(path, "trainer_state.json", "lorry_trainer.json", *RESUME_FILES)
    with api.db.write() as session:
        session.merge(CheckpointRow(job_id=job_id, step=step, path=str(path), bytes=size, created_at=time.time()))
    return path


def fill(api: Api) -> Filled:
    file_id = api.http.post("/v1/files", files={"file": ("rows.jsonl", b'{"text": "a"}\n')}).json()["id"]
    name = unique()
    job = post(api, cpt(name, dataset__path=..., dataset__file_id=file_id))["id"]
    for step in (10, 20):
        add_checkpoint(api, job, step)
    succeed(api, job)
    with api.db.write() as session:
        row = session.get_one(AdapterRow, name)
        row.bytes = whole(Path(str(row.path)))
    running = post(api, cpt(unique(), dataset__path=..., dataset__file_id=file_id))["id"]
    start(api, running)
    add_checkpoint(api, running, 5)
    (api.settings.job_dir(running) / "log.txt").write_text("a line\n")
    waiting = post(api, ift(unique(), init={"adapter": f"{name}@10"}), Idempotency_Key="once")["id"]
    export = post(api, {"kind": "export", "adapter": name, "format": "lora"})["id"]
    succeed(api, export, artifacts={"manifest.json": b"{}", "model.safetensors": b"weights"})
    return Filled(api, file_id, job, name, running, waiting, export)


@pytest.fixture(scope="module")
def filled(api: Api) -> Filled:
    """On each database."""
    return fill(api)


@pytest.fixture(scope="module")
def plain(sqlite_api: Api) -> Filled:
    """On SQLite, for tests in which the database is not the point."""
    return fill(sqlite_api)


@pytest.fixture(scope="module")
def made(plain: Filled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backup of `plain`."""
    target = tmp_path_factory.mktemp("made") / "backup"
    backup(plain.api.settings, target)
    return target


@pytest.fixture
def elsewhere(
    request: pytest.FixtureRequest, filled: Filled, tmp_path: Path, make_settings: Callable[..., Settings]
) -> Settings:
    """An empty database of the other kind, and an empty data folder."""
    kind = "postgres" if filled.api.db.sqlite else "sqlite"
    return make_settings(database_url=new_database(kind, tmp_path, request), data_dir=tmp_path / "elsewhere")


@pytest.fixture
def empty(tmp_path: Path, make_settings: Callable[..., Settings]) -> Settings:
    """No SQLite file yet, and an empty data folder."""
    return make_settings(database_url=f"sqlite:///{tmp_path / 'empty.db'}", data_dir=tmp_path / "empty")


def rows_of(url: str) -> dict[str, list[dict[str, Any]]]:
    engine = create_engine(url)
    with engine.connect() as connection:
        tables = {
            table.name: [dict(r) for r in connection.execute(select(table).order_by(*table.primary_key)).mappings()]
            for table in Base.metadata.sorted_tables
        }
    engine.dispose()
    return tables


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("place", ["backup.tar", "backup"])
def test_a_backup_restores_into_the_other_database(
    filled: Filled, elsewhere: Settings, tmp_path: Path, place: str
) -> None:
    api = filled.api
    before = rows_of(api.settings.sqlalchemy_url)
    report = backup(api.settings, tmp_path / place)
    assert (report.missing, report.damaged, report.deleted) == ([], [], [])
    assert report.left_out == {"checkpoints": 1, "artifacts": 1}
    assert rows_of(api.settings.sqlalchemy_url) == before
    check(tmp_path / place)
    done = restore(elsewhere, tmp_path / place)
    assert done.requeued == [filled.running]
    assert is_current(elsewhere.sqlalchemy_url)

    after = rows_of(elsewhere.sqlalchemy_url)
    old, new = str(api.settings.data_dir.absolute()), str(elsewhere.data_dir.absolute())
    for table, rows in before.items():
        if table in ("jobs", "runs", "events"):  # the running job's are others, see below
            rows = [r for r in rows if filled.running not in (r.get("id"), r.get("job_id"))]
            after[table] = [r for r in after[table] if filled.running not in (r.get("id"), r.get("job_id"))]
        if table in ("adapters", "checkpoints"):
            rows = [{**r, "path": r["path"] and r["path"].replace(old, new)} for r in rows]
        if table == "checkpoints":
            rows = [r for r in rows if (r["job_id"], r["step"]) != (filled.job, 20)]
        if table == "artifacts":
            rows = [r for r in rows if r["path"] == "manifest.json"]
        assert after[table] == rows, table

    theirs, ours = tree(api.settings.data_dir), tree(elsewhere.data_dir)
    ours = {
        name: data for name, data in ours.items() if name.partition("/")[0] in ("files", "adapters", "jobs", "exports")
    }
    assert ours.items() <= theirs.items()
    left = {name for name in theirs.keys() - ours.keys() if not name.startswith((".", "lorry.db"))}
    resume = {f"jobs/{filled.job}/checkpoints/checkpoint-10/{name}" for name in RESUME_FILES}
    twenty = {name for name in theirs if name.startswith(f"jobs/{filled.job}/checkpoints/checkpoint-20/")}
    assert left == resume | twenty | {f"exports/{filled.export}/model.safetensors"}
    assert [p.name for p in elsewhere.data_dir.iterdir() if p.name.startswith((".restore", ".backup"))] == []

    with serve(elsewhere) as there:
        body = there.http.get(f"/v1/jobs/{filled.running}").json()
        assert (body["status"], body["attempt"]) == ("queued", 1)
        assert [(r["outcome"], "backup" in r["reason"]) for r in body["runs"]] == [("queued", True)]
        assert there.http.get(f"/v1/files/{filled.file_id}/content").content == b'{"text": "a"}\n'
        assert there.http.get(f"/v1/jobs/{filled.running}/log").text == "a line\n"
        again = there.http.post(
            "/v1/jobs", json=ift(unique(), init={"adapter": f"{filled.name}@10"}), headers={"Idempotency-Key": "once"}
        )
        assert again.status_code == 409, "keys are remembered"
        queue = JobQueue(elsewhere.redis_url, elsewhere.queue)
        reconcile(there.db, queue, elsewhere)
        assert {filled.running, filled.waiting} <= queue.waiting()


def test_everything_can_be_asked_for(plain: Filled, empty: Settings, tmp_path: Path) -> None:
    report = backup(plain.api.settings, tmp_path / "all.tar", exports=True, checkpoints=True)
    assert report.left_out == {}
    restore(empty, tmp_path / "all.tar")
    with serve(empty) as there:
        url = f"/v1/jobs/{plain.export}/artifacts/model.safetensors"
        assert there.http.get(url).content == b"weights"
        steps = [c["step"] for c in there.http.get(f"/v1/jobs/{plain.job}/checkpoints").json()["data"]]
        assert steps == [10, 20]
        post(there, cpt(unique()))


def test_a_restore_never_goes_over_what_is_there_unless_told(
    filled: Filled, elsewhere: Settings, tmp_path: Path
) -> None:
    one = tmp_path / "one"
    backup(filled.api.settings, one)
    with pytest.raises(BackupError, match="exists"):
        backup(filled.api.settings, one)
    elsewhere.files_dir.mkdir(parents=True)
    (elsewhere.files_dir / "mine").write_text("precious")
    with pytest.raises(BackupError, match="data folder is not empty"):
        restore(elsewhere, one)
    assert not is_current(elsewhere.sqlalchemy_url)
    assert (elsewhere.files_dir / "mine").read_text() == "precious"
    restore(elsewhere, one, replace=True)
    assert not (elsewhere.files_dir / "mine").exists()
    for name in ("files", "adapters", "jobs", "exports"):
        shutil.rmtree(elsewhere.data_dir / name)
    with pytest.raises(BackupError, match="database is not empty: it has rows in files"):
        restore(elsewhere, one)
    engine = create_engine(elsewhere.sqlalchemy_url)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE of_others (id INTEGER)")
        connection.exec_driver_sql("INSERT INTO of_others VALUES (1)")
    restore(elsewhere, one, replace=True)
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT id FROM of_others").scalars().all() == [1]
    engine.dispose()
    assert rows_of(elsewhere.sqlalchemy_url)["files"] == rows_of(filled.api.settings.sqlalchemy_url)["files"]


def test_a_restore_that_cannot_put_a_folder_in_its_place_changes_nothing(
    made: Path, plain: Filled, empty: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    restore(empty, made)
    uploads = tree(empty.files_dir)
    other = backup(plain.api.settings, tmp_path / "exports-too", exports=True)
    assert other.missing == []
    before = rows_of(empty.sqlalchemy_url)
    replace = os.replace

    def busy(source: Any, target: Any) -> None:
        if Path(target) == empty.exports_dir:
            raise OSError(errno.EBUSY, "Device or resource busy")
        replace(source, target)

    monkeypatch.setattr("service.restore.os.replace", busy)
    with pytest.raises(OSError, match="busy"):
        restore(empty, tmp_path / "exports-too", replace=True)
    monkeypatch.undo()
    assert rows_of(empty.sqlalchemy_url) == before
    assert tree(empty.files_dir) == uploads


def damage(kind: str, made: Path) -> None:
    manifest = json.loads((made / "manifest.json").read_text())
    files = [f["path"] for f in manifest["files"]]
    match kind:
        case "a changed byte":
            path = made / next(f for f in files if f.endswith("adapter_model.safetensors"))
            path.write_bytes(b"!" + path.read_bytes()[1:])
            return
        case "a file that is gone":
            (made / next(f for f in files if f.startswith("files/"))).unlink()
            return
        case "a row that is gone":
            path = made / "rows" / "files.jsonl"
            path.write_text("")
            for entry in manifest["files"]:
                if entry["path"] == "rows/files.jsonl":
                    entry |= {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}
        case "a newer revision":
            manifest |= {"revision": "20991231_0001", "lorry": "9.0"}
        case "a newer format":
            manifest |= {"format": 2}
        case "a path that leads out":
            manifest["files"].append({"path": "../evil", "bytes": 0, "sha256": ""})
        case "no manifest":
            (made / "manifest.json").unlink()
            return
    (made / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("a changed byte", "is not what its manifest says"),
        ("a file that is gone", "is missing from it"),
        ("a row that is gone", "0 rows of files"),
        ("a newer revision", "made by lorry 9.0 at database revision '20991231_0001'"),
        ("a newer format", "reads format 1"),
        ("a path that leads out", "no path inside a backup"),
        ("no manifest", "no whole backup"),
    ],
)
def test_a_damaged_backup_changes_nothing(made: Path, empty: Settings, tmp_path: Path, kind: str, says: str) -> None:
    shutil.copytree(made, tmp_path / "one")
    damage(kind, tmp_path / "one")
    with pytest.raises(BackupError, match=says):
        restore(empty, tmp_path / "one")
    assert [p for p in empty.data_dir.rglob("*") if p.is_file() and not p.name.endswith("lock")] == []
    assert not is_current(empty.sqlalchemy_url)


def test_a_tar_that_was_cut_off_is_refused(plain: Filled, empty: Settings, tmp_path: Path) -> None:
    tar = tmp_path / "one.tar"
    backup(plain.api.settings, tar)
    with tarfile.open(tar) as file:
        assert file.getnames()[-1] == "manifest.json"
    os.truncate(tar, tar.stat().st_size // 2)
    with pytest.raises(BackupError, match="no whole backup"):
        restore(empty, tar)


def test_a_backup_is_of_one_moment_while_files_come_and_go(filled: Filled, tmp_path: Path) -> None:
    """Checkpoints are rotated many times a second, and uploads deleted as fast as it goes, in lorry's order."""
    api, end = filled.api, threading.Event()
    job = post(api, cpt(unique()))["id"]
    start(api, job)
    for step in (1, 2):
        add_checkpoint(api, job, step)

    def rotate() -> None:
        step = 2
        while not end.wait(0.05):
            step += 1
            add_checkpoint(api, job, step)
            shutil.rmtree(api.settings.job_dir(job) / "checkpoints" / f"checkpoint-{step - 2}")
            with api.db.write() as session:
                session.delete(session.get_one(CheckpointRow, (job, step - 2)))

    def come_and_go() -> None:
        while not end.is_set():
            file_id = new_id("file").replace("_", "-", 1)
            (api.settings.files_dir / f"{file_id}.txt").write_text("text")
            values = {"filename": "a.txt", "purpose": "fine-tune", "bytes": 4, "sha256": "x" * 64, "created_at": 1.0}
            with api.db.write() as session:
                session.add(FileRow(id=file_id, **values))
            delete_file(api.db, api.settings, file_id)

    threads = [threading.Thread(target=target) for target in (rotate, come_and_go)]
    for thread in threads:
        thread.start()
    try:
        for number in range(4):
            report = backup(api.settings, tmp_path / f"{number}")
            assert report.missing == []
            manifest = check(tmp_path / f"{number}")
            places = {f["path"] for f in manifest["files"]}
            rows = [json.loads(line) for line in (tmp_path / f"{number}/rows/checkpoints.jsonl").open()]
            mine = [row for row in rows if row["job_id"] == job]
            assert mine
            for row in mine:
                assert {f"{row['path']}/{n}" for n in ("trainer_state.json", *RESUME_FILES)} <= places
            for line in (tmp_path / f"{number}/rows/files.jsonl").open():
                row = json.loads(line)
                assert f"files/{row['id']}.{row['filename'].rpartition('.')[2]}" in places
        assert all(thread.is_alive() for thread in threads), "nothing came and went any more"
    finally:
        end.set()
        for thread in threads:
            thread.join()
    api.http.post(f"/v1/jobs/{job}/cancel")


@pytest.fixture
def command(plain: Filled, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The `lorry` command on the filled installation."""
    for name in ("data_dir", "database_url", "redis_url"):
        monkeypatch.setenv(f"LORRY_{name.upper()}", str(getattr(plain.api.settings, name)))
    get_settings.cache_clear()
    previous = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, previous)
    get_settings.cache_clear()


@pytest.mark.usefixtures("command")
def test_what_was_missing_before_is_told(plain: Filled, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = plain.api.settings.files_dir / f"{plain.file_id}.jsonl"
    path.rename(path.with_suffix(".aside"))
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main(["backup", str(tmp_path / "lacking.tar")])
        assert ended.value.code == 2
        assert f"missing: files {plain.file_id}" in capsys.readouterr().err
        path.write_bytes(b"other bytes   \n")
        with pytest.raises(SystemExit):
            cli.main(["backup", str(tmp_path / "other.tar")])
        assert f"damaged: files/{plain.file_id}.jsonl" in capsys.readouterr().err
    finally:
        path.with_suffix(".aside").rename(path)
    cli.main(["backup", str(tmp_path / "good.tar")])
    cli.main(["restore", "--check", str(tmp_path / "good.tar")])
    assert "is whole" in capsys.readouterr().out


def test_a_killed_backup_leaves_nothing_in_its_place(plain: Filled, tmp_path: Path) -> None:
    target = tmp_path / "killed"
    code = (
        "import os, sys, service.backup as b\n"
        "from pathlib import Path\n"
        "from service.settings import Settings\n"
        "b._copy = lambda *a: os.kill(os.getpid(), 9)\n"
        "b.backup(Settings(), Path(sys.argv[1]))\n"
    )
    values = {
        "LORRY_DATA_DIR": str(plain.api.settings.data_dir),
        "LORRY_DATABASE_URL": plain.api.settings.sqlalchemy_url,
    }
    env = {**os.environ, **values, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, str(target)], env=env, timeout=120, check=False)
    assert done.returncode == -9
    assert not target.exists()
    assert list(plain.api.settings.data_dir.glob(".backup-*")) != []
    backup(plain.api.settings, target)
    assert list(plain.api.settings.data_dir.glob(".backup-*")) == []


def test_a_database_of_another_revision_is_not_backed_up(
    tmp_path: Path, make_settings: Callable[..., Settings]
) -> None:
    settings = make_settings(database_url=f"sqlite:///{tmp_path / 'none.db'}")
    with pytest.raises(BackupError, match="at revision none"):
        backup(settings, tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_restore_asks_that_lorry_is_stopped(made: Path, empty: Settings) -> None:
    empty.data_dir.mkdir(exist_ok=True)
    with open(empty.data_dir / ".lorry-up.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(BackupError, match="stop it first"):
            restore(empty, made)
