"""docker-compose.yml, put to work: without Docker, so its services run as processes (tests/compose.py)."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.settings import Settings
from tests.compose import FILE, ROOT, Project, in_order, load, seconds, selected, variables_of
from tests.recipes import TRAINING, texts

KEY = "a key of ours: käse"


@pytest.fixture(scope="module")
def project(tiny_base: Path) -> Iterator[Project]:
    """The file's profile `cpu`, up, with the tiny model as base and two workers."""
    # Not under pytest's own folder, which Postgres' user may not enter.
    with tempfile.TemporaryDirectory(prefix="lorry-compose-", ignore_cleanup_errors=True) as folder:
        root = Path(folder)
        root.chmod(0o755)
        variables = {
            "GPU_WORKERS": "0",
            "GPU_ENGINES": "0",
            "LORRY_BASE_MODEL": "/data/models/tiny",
            "LORRY_TORCH_THREADS": "1",
        }
        project = Project(root, variables, {"cpu"})
        shutil.copytree(tiny_base, project.volume("data") / "models" / "tiny")
        try:
            project.up(scale={"worker-cpu": 2})
            yield project
        finally:
            project.kill()


@pytest.fixture(scope="module")
def http(project: Project) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {project.secret('lorry_api_key')}"}
    with httpx.Client(base_url=project.url("api"), headers=headers, timeout=60, trust_env=False) as client:
        yield client


def until(
    http: httpx.Client, path: str, wanted: Callable[[dict[str, Any]], bool], limit: float = 300
) -> dict[str, Any]:
    """Ask until the answer is as wanted."""
    deadline = time.monotonic() + limit
    while True:
        answer: dict[str, Any] = http.get(path).json()
        if wanted(answer):
            return answer
        assert time.monotonic() < deadline, answer
        time.sleep(0.2)


@pytest.mark.timeout(1200)  # with its fixture: all parts started, two jobs
def test_all_parts_come_up_and_a_job_goes_through_to_its_export_and_its_text(
    project: Project, http: httpx.Client, tmp_path: Path
) -> None:
    # The health check is content with one of the two workers.
    ready = until(http, "/readyz", lambda r: r["ready"] and r["parts"]["workers"]["detail"] == "2 registered")
    assert ready["parts"]["database"]["detail"] == "Postgres"

    rows = texts(tmp_path / "rows.jsonl")
    upload = http.post("/v1/files", files={"file": ("rows.jsonl", rows.read_bytes())}, data={"purpose": "fine-tune"})
    base = str(project.volume("data") / "models" / "tiny")
    spec = {
        "kind": "cpt",
        "adapter": "first",
        "model": {"name": base, "max_seq_length": 64, "load_in_4bit": False},
        "lora": {"r": 8, "lora_alpha": 16},
        "dataset": {"file_id": upload.json()["id"], "test_size": 0.2, "template": {"prompt": "# {title}\n{text}"}},
        "training": {**TRAINING, "max_steps": 3},
    }
    trained = http.post("/v1/jobs", json=spec)
    assert trained.status_code == 202, trained.text
    export = {"kind": "export", "adapter": "first", "format": "merged_16bit", "after": [trained.json()["id"]]}
    exported = http.post("/v1/jobs", json=export)
    assert exported.status_code == 202, exported.text
    for job in (trained, exported):
        ended = until(http, f"/v1/jobs/{job.json()['id']}", lambda row: row["finished_at"] is not None)
        assert ended["status"] == "succeeded", (ended["error"], project.log("worker-cpu")[-3000:])
    artifacts = http.get(f"/v1/jobs/{exported.json()['id']}/artifacts").json()["data"]
    assert any(a["path"].endswith(".safetensors") for a in artifacts)

    body = {"adapter": "first", "prompt": "# t1\n", "max_new_tokens": 8, "stream": True}
    with http.stream("POST", "/generate", json=body) as answer:
        events = [line for line in answer.iter_lines() if line.startswith("event:")]
    assert events[-1] == "event: done", (events, project.log("engine-cpu")[-3000:])
    # What came of it can be told apart by the labels that the dashboards use.
    text = metrics_of(project, http)
    labels = {"lorry_engine_requests_total": {"adapter", "finish_reason"}, "lorry_jobs": {"kind", "status"}}
    for metric, names in labels.items():
        assert set(re.findall(r"(\w+)=", re.findall(rf"^{metric}\{{(.*)\}}", text, flags=re.MULTILINE)[0])) == names


def metrics_of(project: Project, http: httpx.Client) -> str:
    """As Prometheus asks: the API with its key, the engine without."""
    return http.get("/metrics").text + httpx.get(f"{project.url('engine')}/metrics", trust_env=False).text


def test_every_metric_of_the_dashboards_is_one_that_api_or_engine_shows(project: Project, http: httpx.Client) -> None:
    text = metrics_of(project, http)
    families = dict(re.findall(r"^# TYPE (\w+) (\w+)$", text, flags=re.MULTILINE))
    suffixes = {"histogram": ("_bucket", "_sum", "_count"), "summary": ("_sum", "_count")}
    shown = {name + suffix for name, kind in families.items() for suffix in suffixes.get(kind, ("",))}
    dashboards = sorted((ROOT / "deploy" / "grafana" / "dashboards").glob("*.json"))
    assert len(dashboards) == 2
    for path in dashboards:
        board = json.loads(path.read_text("utf-8"))
        queries = [t["expr"] for p in board["panels"] for t in p["targets"]]
        queries += [v["query"]["query"] for v in board["templating"]["list"]]
        asked = {name for query in queries for name in re.findall(r"\blorry_\w+", query)}
        assert asked, path
        assert asked <= shown, f"{path.name}: {asked - shown}"


def test_nothing_answers_without_the_key(project: Project) -> None:
    assert httpx.get(f"{project.url('api')}/v1/jobs", trust_env=False).status_code == 401
    assert httpx.get(f"{project.url('api')}/metrics", trust_env=False).status_code == 401


def test_an_unwell_part_is_told_from_a_well_one(project: Project) -> None:
    parts = ("api", "engine-cpu", "worker-cpu")
    for name in parts:
        project.wait(name, "service_healthy")
    ports, variables = project.ports, project.variables
    try:
        project.ports = {**ports, "api": 1, "engine": 1}
        project.variables = {**variables, "LORRY_QUEUE": "another"}
        assert not any(project.healthy(name) for name in parts)
    finally:
        project.ports, project.variables = ports, variables


def test_all_parts_stop_in_order_and_in_time(project: Project) -> None:
    statuses = project.down()
    assert set(statuses) == {
        "secrets", "postgres", "redis", "migrate", "api", "engine-cpu", "worker-cpu", "worker-cpu-2",
    }  # fmt: skip
    failed = {name: project.log(name.removesuffix("-2"))[-1500:] for name, status in statuses.items() if status}
    assert not failed


# The file itself


def test_the_file_keeps_to_the_compose_schema() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(FILE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_without_profiles_all_of_lorry_starts_and_the_gpu_is_reserved() -> None:
    services = selected(load()["services"], set())
    assert set(services) == {"secrets", "postgres", "redis", "migrate", "api", "worker", "engine"}
    for name in ("worker", "engine"):
        (device,) = services[name]["deploy"]["resources"]["reservations"]["devices"]
        assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    order = in_order(services)
    assert order.index("migrate") > order.index("postgres")
    for name in ("api", "worker"):
        assert services[name]["depends_on"]["migrate"] == {"condition": "service_completed_successfully"}
        assert services[name]["depends_on"]["redis"] == {"condition": "service_healthy"}
    assert services["redis"]["command"][2:4] == ["--appendonly", "yes"]


def test_each_profile_takes_the_place_of_what_it_replaces() -> None:
    env = {"GPU_WORKERS": "0", "GPU_ENGINES": "0"}
    cpu = selected(load(env)["services"], {"cpu"})
    assert {"worker-cpu", "engine-cpu"} == set(cpu) - {"secrets", "postgres", "redis", "migrate", "api"}
    assert all("deploy" not in cpu[n] for n in ("worker-cpu", "engine-cpu"))
    services = load({"GPU_ENGINES": "0", "LORRY_BASE_MODEL": "org/base"})["services"]
    vllm = selected(services, {"vllm", "monitoring"})
    assert set(vllm) == {
        "secrets", "postgres", "redis", "migrate", "api", "worker", "vllm", "prometheus", "grafana", "tensorboard",
    }  # fmt: skip
    assert vllm["vllm"]["command"][0] == "org/base"
    for name in ("engine", "engine-cpu", "vllm"):  # one URL for all three
        assert services[name]["networks"]["default"]["aliases"] == ["engine"]


def test_every_service_restarts_rotates_its_log_and_can_be_scaled() -> None:
    services = load()["services"]
    for name, service in services.items():
        assert service["restart"] == ("no" if name in ("secrets", "migrate") else "unless-stopped"), name
        assert set(service["logging"]["options"]) == {"max-size", "max-file"}, name
        assert "container_name" not in service, name
        assert "healthcheck" in service or name == "tensorboard", name  # the latter's is in its image
        assert name in ("api", "prometheus", "grafana", "tensorboard") or "ports" not in service, name
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), name
        if "image" in service and "build" not in service:
            assert re.search(r":v?\d+\.\d+", service["image"]), f"{name}: {service['image']} is not pinned"


def test_a_worker_has_time_for_its_checkpoint_before_docker_kills_it() -> None:
    services = load()["services"]
    for name in ("worker", "worker-cpu"):
        given = float(services[name]["environment"]["LORRY_SHUTDOWN_SECONDS"])
        assert given == Settings.model_fields["shutdown_seconds"].default
        assert seconds(services[name]["stop_grace_period"]) >= given + 15


def test_every_variable_is_a_setting_or_used_in_the_file_and_explained() -> None:
    known = {f"LORRY_{name.upper()}" for name in Settings.model_fields}
    text = FILE.read_text("utf-8")
    used = set(re.findall(r"\$\{(\w+)", text)) | set(re.findall(r"\bLORRY_[A-Z_]+[A-Z]", text))
    offered = set(variables_of(ROOT / ".env.example"))
    assert {n for n in used | offered if n.startswith("LORRY_")} <= known
    assert {n for n in used if not n.startswith("LORRY_")} <= offered
    # COMPOSE_PROFILES is compose's own.
    assert {n for n in offered if not n.startswith("LORRY_")} <= used | {"COMPOSE_PROFILES"}
    explained = [line for line in (ROOT / ".env.example").read_text("utf-8").splitlines() if line]
    for before, line in pairwise(explained):
        assert line.startswith("#"), "a variable that is set by the example is not optional any more"
        if re.match(r"#[A-Z_]+=", line):
            assert before.startswith("# ") or re.match(r"#[A-Z_]+=", before), line


# Secrets


def test_given_secrets_are_taken_and_the_others_made_once(tmp_path: Path) -> None:
    given, out = tmp_path / "given", tmp_path / "out"
    given.mkdir()
    (given / "README.md").write_text("no secret")
    (given / "lorry_api_key").write_text(f"{KEY}\n", "utf-8")
    (given / "postgres_password").write_text("p@ss/w:rd %")

    def make() -> dict[str, str]:
        subprocess.run([sys.executable, ROOT / "deploy" / "make_secrets.py", given, out], check=True)
        return {p.name: p.read_text("utf-8") for p in out.iterdir()}

    first = make()
    assert set(first) == {
        "lorry_api_key", "postgres_password", "redis_password", "grafana_password",
        "lorry_database_url", "lorry_redis_url", "redis.conf",
    }  # fmt: skip
    assert make() == first
    assert len(first["redis_password"]) >= 32
    settings = read_settings(out)
    assert settings["api_key"] == KEY
    assert settings["database_url"] == "postgresql+psycopg://lorry:p%40ss%2Fw%3Ard%20%25@postgres:5432/lorry"
    assert first["redis_password"] in settings["redis_url"]

    (given / "lorry_database_url").write_text("postgresql+psycopg://me@elsewhere/lorry")
    make()
    assert read_settings(out)["database_url"] == "postgresql+psycopg://me@elsewhere/lorry"


def read_settings(secrets: Path) -> dict[str, Any]:
    """What a process of lorry's reads there."""
    code = "import json; from service.settings import Settings; print(json.dumps(Settings().model_dump(mode='json')))"
    env = {"PYTHONPATH": str(ROOT), "LORRY_SECRETS_DIR": str(secrets), "PYTHONUTF8": "1"}
    out = subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True)
    values: dict[str, Any] = json.loads(out.stdout)
    return values


def test_a_variable_goes_before_a_secret_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lorry_api_key").write_text("from the file\n")
    (tmp_path / "lorry_port").write_text("9000")
    monkeypatch.setenv("LORRY_SECRETS_DIR", str(tmp_path))
    assert (Settings().api_key, Settings().port) == ("from the file", 9000)
    monkeypatch.setenv("LORRY_API_KEY", "from the environment")
    assert Settings().api_key == "from the environment"
    monkeypatch.setenv("LORRY_SECRETS_DIR", str(tmp_path / "missing"))
    assert Settings().port == Settings.model_fields["port"].default


def test_a_hub_token_among_the_secrets_is_the_servers_own(tmp_path: Path) -> None:
    (tmp_path / "hf_token").write_text("hf_from_the_file\n")
    code = "import os; from service.cli import main; main(['settings']); print(os.environ['HF_TOKEN'])"
    env = {"PYTHONPATH": str(ROOT), "LORRY_SECRETS_DIR": str(tmp_path)}
    for given, expected in (({}, "hf_from_the_file"), ({"HF_TOKEN": "hf_variable"}, "hf_variable")):
        out = subprocess.run([sys.executable, "-c", code], env=env | given, check=True, capture_output=True, text=True)
        assert out.stdout.splitlines()[-1] == expected
        assert "hf_from_the_file" not in "".join(out.stdout.splitlines()[:-1])
