"""deploy/ and the Dockerfile: what they name exists, and is what the service has."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.queue import JobQueue
from service.queue_names import needs_of, queues_of
from service.settings import Settings
from tests.compose import ROOT, load

KUBERNETES = ROOT / "deploy" / "kubernetes"
SETTINGS = {f"LORRY_{name.upper()}" for name in Settings.model_fields}
SHUTDOWN: float = Settings.model_fields["shutdown_seconds"].default


def test_the_dockerfile_passes_the_linter() -> None:
    hadolint = shutil.which("hadolint")
    assert hadolint, "hadolint comes with locks/dev.txt"
    done = subprocess.run([hadolint, "--no-color", ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def stages() -> dict[str, dict[str, list[str]]]:
    """The Dockerfile's stages with what they and those they build on say: {stage: {instruction: [arguments]}}."""
    text = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text("utf-8"))
    found: dict[str, dict[str, list[str]]] = {}
    here: dict[str, list[str]] = {}
    for line in text.splitlines():
        instruction, _, rest = line.partition(" ")
        if instruction == "FROM":
            base, _, name = rest.partition(" AS ")
            here = found[name] = {k: list(v) for k, v in found.get(base, {}).items()}
        elif instruction.isupper():
            here.setdefault(instruction, []).append(rest.strip())
    return found


def test_each_image_has_a_health_check_and_no_root() -> None:
    images = {s["build"]["target"] for s in load()["services"].values() if "build" in s}
    assert images == {"api", "worker", "cpu", "tensorboard"}
    for name in images:
        stage = stages()[name]
        assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", stage["USER"][-1]), name
        assert "CMD [" in stage["HEALTHCHECK"][-1], name
        assert stage["CMD"], name


def test_what_the_images_are_made_from_is_sent_to_the_builder() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text("utf-8").split() if line.startswith("!")}
    sources = {
        source
        for stage in stages().values()
        for copy in stage.get("COPY", [])
        if not copy.startswith("--from")
        for source in copy.split()[:-1]
    }
    assert all((ROOT / source).exists() for source in sources)
    assert all({source, *map(str, Path(source).parents)} & kept for source in sources)
    assert all(any(Path(source).is_relative_to(path) for source in sources) for path in kept), "more than is needed"
    api = stages()["build-api"]
    assert any("locks/api.txt" in copy for copy in api["COPY"])
    assert not re.search(r"^torch==", (ROOT / "locks" / "api.txt").read_text("utf-8"), flags=re.MULTILINE)


def test_prometheus_asks_where_the_services_listen() -> None:
    config = yaml.safe_load((ROOT / "deploy" / "prometheus.yml").read_text("utf-8"))
    jobs = {j["job_name"]: j for j in config["scrape_configs"]}
    services = load()["services"]
    for name, port in (("api", "LORRY_PORT"), ("engine", "LORRY_ENGINE_PORT")):
        (found,) = jobs[f"lorry-{name}"]["dns_sd_configs"]
        assert found["names"] == [name]
        assert str(found["port"]) == services[name]["environment"][port]
    folder, _, key = jobs["lorry-api"]["authorization"]["credentials_file"].rpartition("/")
    assert f"secrets:{folder}:ro" in services["prometheus"]["volumes"]
    assert key == "lorry_api_key"


def test_systemd_waits_for_the_workers_checkpoint() -> None:
    unit = (ROOT / "deploy" / "systemd" / "lorry.service").read_text("utf-8")
    found = re.search(r"^TimeoutStopSec=(\d+)$", unit, flags=re.MULTILINE)
    assert found
    assert float(found[1]) >= SHUTDOWN + 15 + 10  # the API's stop before, the queue's after
    assert set(re.findall(r"\bLORRY_[A-Z_]+", unit)) - {"LORRY_"} <= SETTINGS


# Kubernetes


def manifests() -> list[dict[str, Any]]:
    paths = [p for p in KUBERNETES.glob("*.yaml") if p.name != "kustomization.yaml"]
    return [m for p in paths for m in yaml.safe_load_all(p.read_text("utf-8"))]


def pods() -> dict[str, dict[str, Any]]:
    kinds = ("Deployment", "StatefulSet", "Job")
    return {m["metadata"]["name"]: m["spec"]["template"] for m in manifests() if m["kind"] in kinds}


def test_the_manifests_keep_to_kubernetes_schemas(tmp_path: Path) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="not in locks/dev.txt for its size (108 MB)")
    for manifest in manifests():
        if not manifest["apiVersion"].startswith("keda.sh/"):
            validate.validate(manifest, "1.34", strict=True)


def test_kustomize_builds_all_parts() -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not there")
    done = subprocess.run([kubectl, "kustomize", KUBERNETES], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    built = list(yaml.safe_load_all(done.stdout))
    assert len(built) == len([m for m in manifests() if not m["apiVersion"].startswith("keda.sh/")])
    assert all(m["metadata"].get("namespace", "lorry") == "lorry" for m in built)


def test_kubernetes_runs_the_same_parts_as_compose() -> None:
    services = load()["services"]
    for name, pod in pods().items():
        (container,) = pod["spec"]["containers"]
        image = services[name]["image"].rpartition(":")[0] if "build" in services[name] else services[name]["image"]
        assert container["image"] == image, name
        if "build" in services[name]:
            assert container["command"] == services[name]["command"], name
            assert pod["spec"]["securityContext"]["runAsUser"] == int(stages()["api"]["USER"][-1].split(":")[0])
            assert pod["spec"]["enableServiceLinks"] is False
        claims = {v["name"] for v in pod["spec"]["volumes"]}
        templates = {"postgres", "redis"} & {name}
        assert {m["name"] for m in container["volumeMounts"]} <= claims | templates, name
        assert container["resources"]["limits"]["memory"], name
    assert set(pods()) == {"postgres", "redis", "migrate", "api", "worker", "engine"}
    for name in ("worker", "engine"):
        assert pods()[name]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert pods()["worker"]["spec"]["terminationGracePeriodSeconds"] >= SHUTDOWN + 15
    config = next(m for m in manifests() if m["kind"] == "ConfigMap")["data"]
    assert set(config) <= SETTINGS
    used = services["api"]["environment"]
    assert {k: v for k, v in config.items() if k != "LORRY_SECRETS_DIR"} == {
        k: v for k, v in used.items() if k != "LORRY_SECRETS_DIR"
    }
    # lorry reads its secrets where they are mounted.
    mounts = pods()["api"]["spec"]["containers"][0]["volumeMounts"]
    assert config["LORRY_SECRETS_DIR"] in {m["mountPath"] for m in mounts if m["name"] == "secret"}


def test_services_find_their_pods() -> None:
    labels = {name: pod["metadata"]["labels"] for name, pod in pods().items()}
    services = [m for m in manifests() if m["kind"] == "Service"]
    assert {s["metadata"]["name"] for s in services} == {"postgres", "redis", "api", "engine"}
    for service in services:
        assert service["spec"]["selector"] == labels[service["metadata"]["name"]]


def test_keda_counts_the_queue_that_lorry_fills(redis_url: str) -> None:
    (scaled,) = (m for m in manifests() if m["kind"] == "ScaledObject")
    triggers = {t["name"]: t["metadata"]["listName"] for t in scaled["spec"]["triggers"]}
    queue = JobQueue(redis_url, Settings.model_fields["queue"].default)
    # A worker of the Deployment has a GPU: auto serves these.
    names = queues_of(queue.name, needs_of(Settings.model_fields["worker_queues"].default, gpu=True))
    assert sorted(triggers.values()) == sorted(f"rq:queue:{name}" for name in names)
    assert sorted(scaled["spec"]["advanced"]["scalingModifiers"]["formula"].split(" + ")) == sorted(triggers)
    before = [queue.redis.llen(key) for key in triggers.values()]
    queue.enqueue("job_counted", {"resources": {"gpus": 1}, "priority": "high"})
    try:
        counted = [queue.redis.llen(key) - n for key, n in zip(triggers.values(), before, strict=True)]
        assert [name for name, n in zip(triggers, counted, strict=True) if n] == ["gpu_high"]
        assert sum(counted) == 1
    finally:
        queue.remove("job_counted")
        queue.redis.close()
    assert scaled["spec"]["scaleTargetRef"]["name"] in pods()
