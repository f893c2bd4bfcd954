"""The data root in an object store that several hosts share: a real S3 server over a socket, and a plain file:// one."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from moto.moto_server.threaded_moto_server import ThreadedMotoServer

import service.cache as caching
from service.archive import BackupError
from service.backup import backup
from service.cli import main
from service.db import Database
from service.migrate import upgrade
from service.models import AdapterRow, CheckpointRow
from service.queue import JobQueue
from service.reconcile import Report, compare_disk, reconcile
from service.restore import restore
from service.retention import prune
from service.settings import Settings
from service.storage import ObjectStorage, StorageUnavailable, open_storage
from tests.conftest import Api, free_port, new_database, serve
from tests.recipes import cpt_spec, texts
from tests.serving import serve_engine
from tests.steps import error_of
from tests.test_backup import fill
from tests.test_faults_reconcile import claim, end, submit
from tests.worker_kit import Host, child_of, kill


@dataclass
class Root:
    """A data root of its own: what LORRY_DATA_DIR and LORRY_STORAGE_OPTIONS are set to."""

    url: str
    options: dict[str, Any]

    def settings(self, cache: Path, **values: Any) -> Settings:
        """Those of one of the hosts that share it."""
        defaults: dict[str, Any] = {"database_url": f"sqlite:///{cache / 'unused.db'}"}
        cache.mkdir(parents=True, exist_ok=True)
        where: dict[str, Any] = {"data_dir": self.url, "cache_dir": cache, "storage_options": self.options}
        return Settings(**{**defaults, **where, **values})

    def host(self, cache: Path, **values: Any) -> ObjectStorage:
        storage = open_storage(self.settings(cache, **values))
        assert isinstance(storage, ObjectStorage)
        return storage


@pytest.fixture(scope="module")
def s3_server() -> Iterator[dict[str, Any]]:
    """fsspec's options for a real S3 server with a bucket named `lorry`."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    options = {"key": "who", "secret": "what", "endpoint_url": f"http://{host}:{port}"}
    import s3fs

    s3fs.S3FileSystem(**options).mkdir("lorry")
    yield options
    server.stop()


@pytest.fixture
def s3(s3_server: dict[str, Any], tmp_path: Path) -> Root:
    return Root(f"s3://lorry/{tmp_path.name}", s3_server)


@pytest.fixture(params=["file", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Root:
    if request.param == "s3":
        found: Root = request.getfixturevalue("s3")
        return found
    return Root(f"file://{tmp_path / 'shared'}", {})


def folder(path: Path, **files: str) -> Path:
    for name, content in files.items():
        target = path / name.replace("__", "/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(content)
    return path


def content(path: Path) -> dict[str, str]:
    return {p.relative_to(path).as_posix(): p.read_text() for p in path.rglob("*") if p.is_file()}


def test_what_one_host_stores_another_has(root: Root, tmp_path: Path) -> None:
    here, there = root.host(tmp_path / "a"), root.host(tmp_path / "b")
    made = folder(here.root / "adapters" / "one", config="{}", sub__weights="12345")
    assert here.store(made, "adapters/one") == "adapters/one"
    folder(here.root / "adapters" / "one-more", config="")  # a neighbour whose key begins alike
    here.store(here.root / "adapters" / "one-more", "adapters/one-more")
    with there.using("adapters/one") as path:
        assert path == there.root / "adapters" / "one"
        assert content(path) == {"config": "{}", "sub/weights": "12345"}
    assert there.files("adapters/one") == {"config": 2, "sub/weights": 5}
    assert there.files("adapters/one/config") == {"": 2}
    assert there.names("adapters") == ["one", "one-more"]
    assert there.names("nothing") == []
    assert (there.read("adapters/one/sub/weights"), there.read("adapters/one/sub/weights", last=2)) == (b"12345", b"45")
    assert there.read("adapters/one/config", last=100) == b"{}"
    assert there.modified("adapters/one") > 1.7e9
    assert there.from_address(here.address(made)) == "adapters/one"
    here.remove("adapters/one")
    here.remove("adapters/one")  # nothing happens
    assert (there.files("adapters/one"), there.modified("adapters/one")) == ({}, float("inf"))
    for gone in (here, there):
        with pytest.raises(FileNotFoundError), gone.using("adapters/one"):
            pass
        with pytest.raises(FileNotFoundError):
            gone.read("adapters/one/config")
    assert not (here.root / "adapters" / "one").exists()
    with pytest.raises(FileNotFoundError):  # a row of an installation that had a local folder
        there.fetch("/somewhere/else")


def test_what_changed_in_the_store_is_fetched_again(root: Root, tmp_path: Path) -> None:
    here, there = root.host(tmp_path / "a"), root.host(tmp_path / "b")
    here.store(folder(tmp_path / "new", adapter="x", optimizer="y"), "jobs/1/checkpoint", move=False)
    assert content(there.fetch("jobs/1/checkpoint")) == {"adapter": "x", "optimizer": "y"}
    here.remove("jobs/1/checkpoint/optimizer")
    assert content(there.fetch("jobs/1/checkpoint")) == {"adapter": "x"}
    assert content(tmp_path / "new") == {"adapter": "x", "optimizer": "y"}, "a run's own files are its own"


def test_a_fetch_that_breaks_off_leaves_nothing(root: Root, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = root.host(tmp_path / "a"), root.host(tmp_path / "b")
    here.store(folder(tmp_path / "new", one="1", two="2"), "exports/x")
    get, count = there.fs.get_file, []

    def breaks(*args: Any, **kwargs: Any) -> None:
        count.append(1)
        if len(count) == 2:
            raise ConnectionError("cable cut")
        get(*args, **kwargs)

    monkeypatch.setattr(there.fs, "get_file", breaks)
    with pytest.raises(StorageUnavailable, match="cable cut"), there.using("exports/x"):
        pass
    assert not (there.root / "exports").exists()
    assert not [p for p in (there.root / ".cache").rglob("*") if p.is_file()]
    there.patience = 30  # a run is patient
    count.clear()
    assert content(there.fetch("exports/x")) == {"one": "1", "two": "2"}


def test_two_that_want_the_same_thing_fetch_it_once(s3: Root, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = s3.host(tmp_path / "a"), s3.host(tmp_path / "b")
    here.store(folder(tmp_path / "new", **{f"part{n}": "x" * 1000 for n in range(5)}), "adapters/x")
    get, count = there.fs.get_file, []
    monkeypatch.setattr(there.fs, "get_file", lambda *args: (count.append(1), get(*args)))
    threads = [threading.Thread(target=there.fetch, args=("adapters/x",)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(content(there.root / "adapters" / "x")) == 5
    assert len(count) == 5


def test_the_cache_keeps_what_is_in_use_and_what_was_used_last(
    root: Root, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = root.host(tmp_path / "a"), root.host(tmp_path / "b", cache_bytes=250)
    for name in "pqrs":
        here.store(folder(tmp_path / name, data="x" * 100), f"adapters/{name}")
    there.fetch("adapters/p")
    there.fetch("adapters/q")
    there.fetch("adapters/r")
    assert there.names("adapters") == ["p", "q", "r", "s"]
    present = lambda: sorted(p.name for p in (there.root / "adapters").iterdir())  # noqa: E731
    assert present() == ["p", "q", "r"], "just used: it may be about to be opened"
    monkeypatch.setattr(caching, "_GRACE", 0.0)
    with there.using("adapters/q"):
        there.fetch("adapters/s")
        assert present() == ["q", "s"]
        there.cache.limit = 0
        there.cache.shrink()
        assert present() == ["q"]
        there.cache.limit = 250
    assert content(there.fetch("adapters/p")) == {"data": "x" * 100}
    assert there.cache.bytes() <= 250


def test_a_store_that_is_away_is_said_so(tmp_path: Path) -> None:
    options = {"key": "a", "secret": "b", "endpoint_url": f"http://127.0.0.1:{free_port()}"}
    storage = Root("s3://lorry/x", {**options, "config_kwargs": {"retries": {"max_attempts": 0}}}).host(tmp_path / "a")
    storage.fs.retries = 0
    for call in (lambda: storage.read("x"), lambda: storage.fetch("x"), lambda: storage.store(tmp_path, "x")):
        with pytest.raises(StorageUnavailable, match="s3://lorry/x"):
            call()


def test_a_store_that_is_away_ends_nobody_s_reconciling_and_its_key_is_in_no_listing(
    sqlite_url: str, redis_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"key": "who-asks", "secret": "not-for-you", "endpoint_url": f"http://127.0.0.1:{free_port()}"}
    settings = Root("s3://lorry/x", options).settings(tmp_path / "a", database_url=sqlite_url, redis_url=redis_url)
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)
    with serve(settings) as api:
        assert reconcile(api.db, api.queue, settings).missing == []
    monkeypatch.setenv("LORRY_DATA_DIR", "s3://lorry/x")
    monkeypatch.setenv("LORRY_DATABASE_URL", sqlite_url)
    monkeypatch.setenv("LORRY_STORAGE_OPTIONS", json.dumps(options))
    main(["settings"])
    assert "not-for-you" not in (shown := capsys.readouterr().out)
    assert "s3://lorry/x" in shown


def test_a_url_needs_a_database_that_hosts_can_share_and_a_known_scheme(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="LORRY_DATABASE_URL"):
        Settings(data_dir="s3://bucket/lorry")
    with pytest.raises(SystemExit, match="LORRY_DATA_DIR: nonsense://"):
        Root("nonsense://x", {}).host(tmp_path)


def test_an_upload_to_one_api_is_read_and_deleted_through_another(
    s3: Root, sqlite_url: str, redis_url: str, tmp_path: Path
) -> None:
    shared = {"database_url": sqlite_url, "redis_url": redis_url}
    data = b'{"text": "one"}\n' * 1000
    with serve(s3.settings(tmp_path / "a", **shared)) as a, serve(s3.settings(tmp_path / "b", **shared)) as b:
        sent = a.http.post("/v1/files", files={"file": ("x.jsonl", data)})
        assert sent.status_code == 200, sent.text
        url = f"/v1/files/{sent.json()['id']}"
        assert b.http.get(f"{url}/content").content == data
        part = b.http.get(f"{url}/content", headers={"Range": "bytes=10-19"})
        assert (part.status_code, part.content) == (206, data[10:20])
        assert b.http.delete(url).status_code == 200
        assert a.http.get(f"{url}/content").status_code == 404
        assert s3.host(tmp_path / "c").names("files") == []
        compare_disk(a.db, a.settings, Report())
        assert not list(a.settings.files_dir.iterdir()), "nor in the cache of the first"
        # the store goes away in the middle: an answer that says so, and neither row nor file
        refused = serve_without_store(a.settings).model_copy(update={"data_dir": tmp_path / "d"})
        with serve(refused) as c:
            c.app.state.settings.storage_options["retries"] = 0
            answer = c.http.post("/v1/files", files={"file": ("x.jsonl", data)}, timeout=120)
            assert (answer.status_code, error_of(answer)["code"]) == (503, "storage_unavailable")
            assert answer.headers["retry-after"]
            assert c.http.get("/v1/files").json()["data"] == []
            assert not [p for p in refused.files_dir.rglob("*") if p.is_file()]


def serve_without_store(settings: Settings) -> Settings:
    away = {**settings.storage_options, "endpoint_url": f"http://127.0.0.1:{free_port()}"}
    return settings.model_copy(update={"storage_options": away})


def test_a_backup_of_a_folder_restores_into_a_store_and_back(
    s3: Root, sqlite_api: Api, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    filled = fill(sqlite_api)
    export, upload = filled.export, filled.file_id
    first, second = tmp_path / "first", tmp_path / "second.tar"
    backup(sqlite_api.settings, first, exports=True, checkpoints=True)

    remote = s3.settings(tmp_path / "cache", database_url=new_database("sqlite", tmp_path, request))
    restore(remote, first)
    store = open_storage(remote)
    assert store.names("files") == [f"{upload}.jsonl"]
    with pytest.raises(BackupError, match="s3://lorry"):
        restore(remote.model_copy(update={"database_url": f"sqlite:///{tmp_path / 'fresh.db'}"}), first)
    with serve(remote) as api:
        assert api.http.get(f"/v1/jobs/{export}/artifacts/model.safetensors").content == b"weights"
        assert api.http.get(f"/v1/files/{upload}/content").content == b'{"text": "a"}\n'
        assert api.http.get(f"/v1/adapters/{filled.name}").json()["servable_by"]["lorry"]
    report = Report()
    compare_disk(db := Database(remote.sqlalchemy_url), remote, report)
    assert (report.missing, report.swept, report.unknown) == ([], [], [])
    db.dispose()

    taken = backup(remote, second, exports=True, checkpoints=True)
    assert (taken.missing, taken.damaged) == ([], [])
    local = Settings(data_dir=tmp_path / "local", database_url=new_database("sqlite", tmp_path, request))
    restore(local, second)
    assert (local.exports_dir / export / "model.safetensors").read_bytes() == b"weights"
    with sqlite_api.db.read() as old, Database(local.sqlalchemy_url).read() as new:
        for table in (AdapterRow, CheckpointRow):
            for a, b in zip(old.query(table).all(), new.query(table).all(), strict=True):
                if a.path is None:  # still being made
                    continue
                before, after = Path(a.path), Path(b.path or "")
                assert after.is_relative_to(local.data_dir)
                names = {p.name for p in after.iterdir()}
                assert names >= {"adapter_config.json", "adapter_model.safetensors"}
                assert all((after / n).read_bytes() == (before / n).read_bytes() for n in names)
    restore(remote, second, replace=True)
    assert [n.partition(".")[0] for n in store.names("exports")] == [export]


def hosts(root: Root, request: pytest.FixtureRequest, tmp_path: Path, redis_url: str) -> Callable[[str], Host]:
    """Hosts by name that share a database, a queue and the root, each with a disk of its own."""
    url = new_database("sqlite", tmp_path, request)
    upgrade(url)

    def host(name: str) -> Host:
        settings = root.settings(
            tmp_path / name,
            database_url=url,
            redis_url=redis_url,
            queue=f"q-{tmp_path.name}",
            heartbeat_seconds=0.5,
            heartbeat_timeout_seconds=10,
            shutdown_seconds=20,
        )
        db = Database(url)
        request.addfinalizer(db.dispose)
        return Host(settings, db, JobQueue(redis_url, settings.queue), tmp_path / f"{name}.log")

    return host


def losses(host: Host, job: str) -> list[Any]:
    return [(p["step"], p["loss"]) for p in host.metrics(job)["train"]]


def test_a_job_goes_on_at_another_host_and_what_it_made_is_served_and_downloaded_at_a_third(
    s3: Root, request: pytest.FixtureRequest, tiny_base: Path, redis_url: str, tmp_path: Path
) -> None:
    host = hosts(s3, request, tmp_path, redis_url)
    a, b, c = host("a"), host("b"), host("c")
    file = a.upload(texts(tmp_path / "cpt.jsonl", n=100))
    change = {"max_steps": 60, "logging_steps": 1, "eval_steps": 1000, "save_steps": 10, "save_total_limit": 2}
    spec = cpt_spec(tiny_base, dataset={"file_id": file}, training=change)
    whole, moved = a.submit({**spec, "adapter": "whole"}), a.submit({**spec, "adapter": "moved"})
    export = a.submit({"kind": "export", "adapter": "moved", "format": "lora", "after": [moved]})
    with a.worker() as process:
        a.status(whole, "succeeded", "failed")
        a.step(moved, 25)
        child = child_of(process)
        kill(process.pid)
        kill(child)
    with b.worker():
        row = b.status(moved, "succeeded", "failed")
        assert row.status == "succeeded", row.error
        assert b.status(export, "succeeded", "failed").status == "succeeded", b.job(export).error
    assert row.attempt >= 2
    assert any("resumed from the checkpoint of step" in e.data["message"] for e in b.events(moved, "log"))
    assert losses(b, moved) == losses(b, whole)
    store = open_storage(c.settings)
    assert len([n for n in store.names(f"jobs/{moved}/checkpoints") if n.endswith(b.runs(moved)[-1].id[-8:])]) == 2
    assert not (b.settings.job_dir(moved)).exists(), "what a run leaves is stored"
    with b.db.read() as session:
        paths = {r.name: r.path for r in session.query(AdapterRow)}
    assert sorted(paths.values()) == [f"adapters/{n}" for n in store.names("adapters")]

    with serve_engine(c.settings.model_copy(update={"base_model": str(tiny_base), "torch_threads": 1})) as engine:
        settings = c.settings.model_copy(update={"engine_url": engine.url, "base_model": str(tiny_base)})
        with serve(settings) as api:
            texts_of = {}
            for ref in ("moved", "whole", f"moved@{row.result['step']}", f"{moved}@50"):
                answer = api.http.post("/generate", json={"adapter": ref, "prompt": "The tide", "temperature": 0})
                assert answer.status_code == 200, answer.text
                texts_of[ref] = answer.json()["text"]
            assert texts_of["moved"] == texts_of["whole"]
            listed = api.http.get(f"/v1/jobs/{export}/artifacts").json()["data"]
            weights = api.http.get(f"/v1/jobs/{export}/artifacts/adapter_model.safetensors")
            assert weights.status_code == 200
            assert (
                int(weights.headers["content-length"])
                == {f["path"]: f["bytes"] for f in listed}["adapter_model.safetensors"]
            )
            tar = api.http.get(f"/v1/jobs/{export}/artifacts.tar")
            assert (tar.status_code, len(tar.content)) == (200, int(tar.headers["content-length"]))
            assert f"attempt {row.attempt} run" in api.http.get(f"/v1/jobs/{moved}/log").text
            report = Report()
            compare_disk(c.db, settings, report)
            assert (report.missing, report.swept, report.unknown) == ([], [], [])
            assert api.http.delete("/v1/adapters/whole").status_code == 200
            assert store.names("adapters") == [paths["moved"].removeprefix("adapters/")]
            assert store.names(f"jobs/{whole}/checkpoints") == []

    let_go = c.settings.model_copy(update={"keep_checkpoints_days": 0, "keep_logs_days": 0, "keep_uploads_days": 0})
    gone = prune(c.db, let_go)
    assert gone is not None
    assert {item.kind for item in gone.gone} >= {"checkpoint", "log", "upload"}
    assert (store.names(f"jobs/{moved}"), store.names("files")) == ([], [])
    assert store.files(paths["moved"]), "the adapter itself stays"


def test_what_a_dead_run_stored_is_swept_and_a_folder_that_is_gone_is_told(
    s3: Root, request: pytest.FixtureRequest, redis_url: str, tmp_path: Path
) -> None:
    at = hosts(s3, request, tmp_path, redis_url)
    host, other = at("a"), at("b")
    store = open_storage(host.settings)
    jobs = {name: submit(host, name) for name in ("done", "dead", "live", "gone")}
    runs = {name: claim(host, job) for name, job in jobs.items()}

    def stored(key: str) -> str:
        return store.store(folder(tmp_path / "made" / key, file="x"), key, move=False)

    keys = {name: stored(f"adapters/{jobs[name]}.{runs[name][-8:]}") for name in ("done", "dead", "live")}
    older, export = stored(f"adapters/{jobs['live']}.00000000"), stored(f"exports/{jobs['dead']}.{runs['dead'][-8:]}")
    with host.db.write() as session:
        for name in ("done", "gone"):
            row = session.get_one(AdapterRow, name)
            row.ready, row.path = True, keys.get(name, f"adapters/{jobs[name]}.{runs[name][-8:]}")
    open_storage(other.settings).fetch(keys["dead"])
    for name, to in (("done", "succeeded"), ("gone", "succeeded"), ("dead", "failed")):
        end(host, jobs[name], runs[name], to)  # type: ignore[arg-type]
    scratch, ending = (folder(other.settings.job_dir(jobs[name]), log="x") for name in ("done", "dead"))
    os.utime(scratch, (0, 0))
    report = Report()
    compare_disk(other.db, other.settings, report)
    assert (scratch.exists(), ending.exists()) == (False, True), "a run that is just ending stores its log first"
    assert set(store.names("adapters")) == {keys[n].removeprefix("adapters/") for n in ("done", "live")}
    assert store.names("exports") == []
    assert report.missing == ["gone"]
    assert {str(p) for p in report.swept} >= {str(Path(store.address(k))) for k in (keys["dead"], older, export)}
    assert not (other.settings.data_dir / keys["dead"]).exists(), "nor in a cache"
