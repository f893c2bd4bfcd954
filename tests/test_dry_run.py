"""POST /v1/jobs/dry-run over a socket: what it says is what the job then does, and it leaves nothing behind."""

from __future__ import annotations

import http.client
import importlib.util
import json
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import func, select

from service.models import AdapterRow, EventRow, JobRow, RunRow
from service.settings import Settings
from tests.conftest import Api, new_database, serve
from tests.recipes import chats, cpt_spec, ift_spec, texts, write_rows
from tests.steps import cpt, error_of, ift, post, unique
from tests.worker_kit import Host, host_on


@pytest.fixture(scope="module")
def host(
    make_settings: Callable[..., Settings], tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Host]:
    """A database, a queue and a data folder on which the module's API and a worker run."""
    folder = tmp_path_factory.mktemp("dry-run")
    settings = make_settings(database_url=new_database("sqlite", folder, request), heartbeat_seconds=0.5)
    with host_on(settings, folder / "worker.log") as made:
        yield made


@pytest.fixture(scope="module")
def served(host: Host) -> Iterator[Api]:
    with serve(host.settings) as api:
        api.http.timeout = httpx.Timeout(300)
        yield api


@pytest.fixture(scope="module")
def rows(host: Host, tmp_path_factory: pytest.TempPathFactory) -> str:
    return host.upload(texts(tmp_path_factory.mktemp("rows") / "cpt.jsonl", n=100))


def ask(api: Api, spec: dict[str, Any], **headers: str) -> dict[str, Any]:
    answer = api.http.post("/v1/jobs/dry-run", json=spec, headers=headers)
    assert answer.status_code == 200, answer.text
    report: dict[str, Any] = answer.json()
    assert report["object"] == "job.dry_run"
    return report


def stored(api: Api) -> dict[str, int]:
    with api.db.read() as session:
        tables = (JobRow, AdapterRow, RunRow, EventRow)
        return {t.__tablename__: session.scalar(select(func.count()).select_from(t)) or 0 for t in tables}


def files_of(api: Api) -> set[str]:
    """What is in the data folder, but for the database's files and the cache of tokenised data."""
    found = {str(p.relative_to(api.settings.data_dir)) for p in api.settings.data_dir.rglob("*")}
    return {name for name in found if not name.startswith("lorry.db") and name.partition("/")[0] != "tokens"}


@pytest.fixture(scope="module")
def trained(served: Api, host: Host, tiny_base: Path, rows: str) -> dict[str, Any]:
    """A dry run, and the same spec as a job that a worker then carried out."""
    spec = cpt_spec(tiny_base, adapter="dry", dataset={"file_id": rows}, training={"save_total_limit": 2})
    before = stored(served), files_of(served)
    report = ask(served, spec)
    assert (stored(served), files_of(served)) == before
    assert served.http.get("/v1/adapters/dry").status_code == 404
    job = post(served, spec)
    with host.worker():
        row = host.status(job["id"], "succeeded", "failed")
    assert row.status == "succeeded", row.error
    return {"spec": spec, "report": report, "job": served.http.get(f"/v1/jobs/{job['id']}").json()}


def test_what_it_says_is_what_the_job_then_reports(trained: dict[str, Any], served: Api) -> None:
    report, job = trained["report"], trained["job"]
    assert report["ok"] is True
    assert report["error"] is None
    assert report["spec"] == job["spec"]
    assert report["lineage"] == job["lineage"]
    record = job["runs"][-1]["record"]
    assert report["data"] == record["data"]
    assert report["data"]["train_tokens"] > 0
    parameters = {"trainable": record["trainable_parameters"], "total": record["total_parameters"]}
    assert report["parameters"] == parameters
    assert report["steps"]["total"] == job["progress"]["total_steps"]
    assert report["steps"]["rows_per_step"] == 4
    points = served.http.get(f"/v1/jobs/{job['id']}/metrics").json()["train"]
    assert report["steps"]["epochs"] == pytest.approx(points[-1]["epoch"], abs=1e-3)
    assert report["steps"]["tokens"] == pytest.approx(
        job["progress"]["tokens"], rel=0.2
    )  # which rows come first is chance


def test_what_it_tokenised_is_there_for_the_job(trained: dict[str, Any]) -> None:
    assert trained["job"]["runs"][-1]["record"]["preparation"]["cache"] == "hit"


def test_the_disk_it_names_holds_the_checkpoints_that_the_job_writes(trained: dict[str, Any], host: Host) -> None:
    disk = trained["report"]["disk"]
    folder = host.settings.job_dir(trained["job"]["id"]) / "checkpoints"
    checkpoints = [p for p in folder.iterdir() if p.name.startswith("checkpoint-")]
    assert disk["checkpoints"] == len(checkpoints) == 2
    weights = checkpoints[0] / "adapter_model.safetensors"
    assert weights.stat().st_size == pytest.approx(disk["adapter_bytes"], rel=0.05)
    states = (checkpoints[0] / "optimizer.pt").stat().st_size
    assert weights.stat().st_size + states == pytest.approx(disk["checkpoint_bytes"], rel=0.1)
    assert disk["needed_bytes"] > sum(p.stat().st_size for p in folder.rglob("*"))
    assert disk["fits"] is True


def test_memory_is_given_by_part_and_time_only_from_runs_of_the_installation(
    trained: dict[str, Any], served: Api
) -> None:
    memory = trained["report"]["memory"]
    assert sum(memory["parts"].values()) == memory["peak_bytes"] > 0
    assert (memory["device"], memory["of"], memory["fits"]) == ("cpu", "this host", True)
    first = trained["report"]["time"]
    assert (first["seconds"], first["runs"]) == (None, 0)
    assert "no run" in first["why"]
    again = ask(served, {**trained["spec"], "adapter": unique()})["time"]
    points = served.http.get(f"/v1/jobs/{trained['job']['id']}/metrics").json()["train"]
    speeds = sorted(p["tokens_per_second"] for p in points)
    assert again["runs"] == 1
    assert speeds[0] <= again["tokens_per_second"] <= speeds[-1]
    tokens = trained["report"]["steps"]["tokens"]
    assert again["seconds"] == pytest.approx(tokens / again["tokens_per_second"], abs=0.06)


def test_a_chosen_batch_keeps_the_rows_of_a_step(served: Api, tiny_base: Path, rows: str) -> None:
    spec = cpt_spec(
        tiny_base,
        adapter=unique(),
        dataset={"file_id": rows},
        training={"per_device_train_batch_size": "auto", "gradient_accumulation_steps": 2},
    )
    steps = ask(served, spec)["steps"]
    assert (steps["rows_per_step"], steps["per_device_train_batch_size"]) == (16, 8)


def test_on_several_gpus_each_takes_the_rows_of_one(served: Api, tiny_base: Path, rows: str) -> None:
    alone, both = (
        ask(served, cpt_spec(tiny_base, adapter=unique(), dataset={"file_id": rows}, resources={"gpus": gpus}))["steps"]
        for gpus in (1, 2)
    )
    assert both["rows_per_step"] == 2 * alone["rows_per_step"]
    assert both["per_epoch"] < alone["per_epoch"]


# Data


def test_malformed_rows_are_named_as_the_job_would_name_them(
    served: Api, host: Host, tiny_base: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(
        '{"title": "a", "text": "b"}\n{"title": "a", "text": 5\n{"title": "a", "text": "c"}\n{"title": "d"}\n'
    )
    report = ask(served, cpt_spec(tiny_base, adapter=unique(), dataset={"file_id": host.upload(bad)}))
    assert report["ok"] is False
    assert report["error"]["code"] == "invalid_data"
    assert [row["row"] for row in report["error"]["rows"]] == [2, 4]
    assert "2 rows are malformed" in report["error"]["message"]
    assert report["data"] is None
    assert report["steps"] is None


def test_truncated_rows_and_rows_without_a_trained_token_are_counted(
    served: Api, host: Host, tiny_base: Path, tmp_path: Path
) -> None:
    def talk(ask: str, answer: str) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]}

    many = " ".join(f"word {n}" for n in range(200))
    made = [talk("short", "fine") for _ in range(10)] + [talk("short", many)] * 3 + [talk(many, "never seen")] * 2
    file = host.upload(write_rows(tmp_path / "ift.jsonl", made))
    spec = ift_spec(
        tiny_base,
        adapter=unique(),
        dataset={"file_id": file, "test_size": 0},
        training={"train_on_responses_only": True},
    )
    report = ask(served, spec)
    assert report["ok"] is True
    counted = {k: report["data"][k] for k in ("rows", "train_rows", "truncated_rows", "dropped_rows")}
    assert counted == {"rows": 15, "train_rows": 13, "truncated_rows": 5, "dropped_rows": 2}
    assert report["data"]["trained_tokens"] < report["data"]["train_tokens"]


def test_what_the_worker_would_find_wrong_is_the_report_s_error(served: Api, tiny_base: Path, rows: str) -> None:
    changes: list[tuple[dict[str, Any], str, str]] = [
        ({"dataset": {"file_id": rows, "template": {"prompt": "{nothing}"}}}, "invalid_data", "nothing"),
        ({"lora": {"target_modules": ["q_proj", "router"]}, "dataset": {"file_id": rows}}, "invalid_spec", "router"),
    ]
    for change, code, message in changes:
        report = ask(served, cpt_spec(tiny_base, adapter=unique(), **change))
        assert (report["ok"], report["error"]["code"]) == (False, code)
        assert message in report["error"]["message"]


# Refusals, as POST /v1/jobs has them


def test_refusals_are_those_of_the_job_itself(trained: dict[str, Any], served: Api) -> None:
    taken = trained["spec"]
    unknown = cpt(unique(), dataset__path=..., dataset__file_id="file_000000000000000000000000")
    for spec in (
        taken,
        unknown,
        ift(unique(), init={"adapter": "never-made"}),
        cpt(unique(), after=["job_000000000000000000000000"]),
        cpt(unique(), lora__r=0),
        cpt(unique(), surprise=1),
        {"kind": "export", "adapter": "never-made"},
        {"kind": "nonsense"},
    ):
        dry, job = (served.http.post(path, json=spec) for path in ("/v1/jobs/dry-run", "/v1/jobs"))
        assert dry.status_code == job.status_code >= 400
        assert error_of(dry) == error_of(job)


def test_the_call_is_in_the_api_s_description(served: Api) -> None:
    call = served.http.get("/openapi.json").json()["paths"]["/v1/jobs/dry-run"]["post"]
    assert call["responses"]["200"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/DryRun"}


def test_a_host_without_the_training_packages_says_where_to_ask(
    served: Api, tiny_base: Path, rows: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "torch" else there(name, *a))
    spec = cpt_spec(tiny_base, adapter=unique(), dataset={"file_id": rows})
    answer = served.http.post("/v1/jobs/dry-run", json=spec)
    assert (answer.status_code, error_of(answer)["code"]) == (503, "dry_run_unavailable")
    assert "torch" in error_of(answer)["message"]
    assert "host of a worker" in error_of(answer)["message"]


# Its process


def children() -> set[str]:
    """Command lines of the dry runs' processes."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if "worker.dry_run" in line:
            found.add(f"{path.parent.name} {line}")
    return found


def until(condition: Callable[[], bool], seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_a_client_that_leaves_ends_it_and_a_token_is_in_no_command_line(
    served: Api, tiny_base: Path, rows: str
) -> None:
    before = children()
    body = json.dumps(cpt_spec(tiny_base, adapter=unique(), dataset={"file_id": rows}))
    client = http.client.HTTPConnection(served.url.removeprefix("http://"))
    headers = {"Content-Type": "application/json", "X-HF-Token": "hf_secretsecretsecret"}
    client.request("POST", "/v1/jobs/dry-run", body, headers)
    assert until(lambda: bool(children() - before))
    assert "hf_secret" not in "".join(children())
    client.close()
    assert until(lambda: children() <= before)
    assert until(lambda: served.app.state.dry_runs.running == 0)


def test_it_ends_at_its_time_limit(host: Host, tiny_base: Path, rows: str) -> None:
    before = children()
    spec = cpt_spec(tiny_base, adapter=unique(), dataset={"file_id": rows})
    with serve(host.settings.model_copy(update={"dry_run_seconds": 0.2})) as api:
        answer = api.http.post("/v1/jobs/dry-run", json=spec)
        assert (answer.status_code, error_of(answer)["code"]) == (503, "dry_run_timeout")
        assert children() <= before


def test_no_more_run_at_once_than_allowed(host: Host, tiny_base: Path, rows: str) -> None:
    spec = cpt_spec(tiny_base, adapter=unique(), dataset={"file_id": rows})
    with serve(host.settings.model_copy(update={"dry_runs": 1})) as api, ThreadPoolExecutor(1) as pool:
        api.http.timeout = httpx.Timeout(300)
        first = pool.submit(api.http.post, "/v1/jobs/dry-run", json=spec)
        assert until(lambda: api.app.state.dry_runs.running == 1)
        answer = api.http.post("/v1/jobs/dry-run", json=spec)
        assert (answer.status_code, error_of(answer)["code"]) == (503, "dry_runs_busy")
        assert answer.headers["retry-after"]
        assert first.result().json()["ok"] is True
        assert api.app.state.dry_runs.running == 0
    with serve(host.settings.model_copy(update={"dry_runs": 0})) as api:
        answer = api.http.post("/v1/jobs/dry-run", json=spec)
        assert (answer.status_code, error_of(answer)["code"]) == (503, "dry_run_unavailable")


# Where the data is


def test_an_upload_in_an_object_store_is_fetched_as_a_job_would_and_postgres_keeps_no_lock(
    make_settings: Callable[..., Settings], tiny_base: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    settings = make_settings(
        data_dir=f"file://{tmp_path / 'store'}",
        cache_dir=tmp_path / "cache",
        database_url=new_database("postgres", tmp_path, request),
    )
    with host_on(settings, tmp_path / "worker.log"), serve(settings) as api:
        api.http.timeout = httpx.Timeout(300)
        with open(texts(tmp_path / "cpt.jsonl", n=100), "rb") as file:
            sent = api.http.post("/v1/files", files={"file": file}, data={"purpose": "fine-tune"}).json()
        shutil.rmtree(settings.data_dir / "files", ignore_errors=True)  # as on another host: the store alone has it
        report = ask(api, cpt_spec(tiny_base, adapter=unique(), dataset={"file_id": sent["id"]}))
        assert report["ok"] is True
        assert report["data"]["rows"] == 100
        assert api.http.delete(f"/v1/files/{sent['id']}").status_code == 200
        gone = api.http.post(
            "/v1/jobs/dry-run", json=cpt_spec(tiny_base, adapter=unique(), dataset={"file_id": sent["id"]})
        )
        assert (gone.status_code, error_of(gone)["code"]) == (404, "file_not_found")


# What comes after a training


def test_an_instruction_tuning_may_start_from_a_finished_adapter_or_from_one_to_come(
    trained: dict[str, Any], served: Api, host: Host, tiny_base: Path, tmp_path: Path
) -> None:
    file = host.upload(chats(tmp_path / "ift.jsonl"))
    spec = ift_spec(tiny_base, adapter=unique(), dataset={"file_id": file})
    del spec["lora"]
    stack = ask(served, {**spec, "init": {"adapter": "dry", "mode": "stack"}, "lora": {"r": 4}})
    assert stack["ok"] is True
    parent = trained["report"]["disk"]["adapter_bytes"]
    assert stack["disk"]["adapter_bytes"] == pytest.approx(4 * stack["parameters"]["trainable"] + parent, rel=0.05)
    assert ask(served, {**spec, "init": {"adapter": "dry"}})["spec"]["lora"]["r"] == 8  # the parent's
    waiting = post(served, {**trained["spec"], "adapter": (name := unique())})
    coming = ask(served, {**spec, "init": {"adapter": name}, "after": [waiting["id"]]})
    assert coming["ok"] is True
    assert coming["lineage"]["jobs"] == [waiting["id"]]
    export = ask(served, {"kind": "export", "adapter": name, "format": "merged_16bit", "after": [waiting["id"]]})
    assert "still to be made" in export["export"]["why"]
    served.http.post(f"/v1/jobs/{waiting['id']}/cancel")


@pytest.mark.parametrize("format", ["lora", "merged_16bit", "merged_4bit", "gguf"])
def test_an_export_s_disk_and_types_are_known_before_it_is_made(
    trained: dict[str, Any], served: Api, format: str
) -> None:
    before = stored(served), files_of(served)
    report = ask(served, {"kind": "export", "adapter": "dry", "format": format})
    assert (stored(served), files_of(served)) == before
    assert report["ok"] is True, report["error"]
    assert report["disk"]["needed_bytes"] > 0
    assert report["memory"]["peak_bytes"] == sum(report["memory"]["parts"].values())
    assert (report["data"], report["time"]) == (None, None)
    types = report["export"]["tensor_types"]
    assert set(types or ()) == {"merged_16bit": {"bfloat16"}, "merged_4bit": {"bfloat16", "nf4"}}.get(format, set())
    assert json.dumps(report)
