"""Several hosts, as processes with a disk each: three workers and two engines that share Postgres, a queue and a bucket."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.migrate import upgrade
from tests.conftest import free_port, new_database
from tests.recipes import cpt_spec, texts
from tests.test_storage import s3_server as s3_server  # a fixture
from tests.worker_kit import ROOT, kill

SECONDS = 400.0  # for what takes some on an idle machine


class Hosts:
    """Processes by name; each host has a folder of its own for its cache and its log."""

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        self.folder, self.env = folder, env
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, command: str, **settings: Any) -> None:
        own = self.folder / name
        own.mkdir(parents=True, exist_ok=True)
        values = {f"LORRY_{k.upper()}": str(v) for k, v in settings.items()}
        env = {**self.env, "LORRY_CACHE_DIR": str(own / "cache"), **values}
        with open(own / "log", "ab") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", "service.cli", command],
                env=env, cwd=own, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def kill(self, name: str) -> None:
        """The whole host at once: the process and what it started."""
        pid = self.processes[name].pid
        below = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for one in (pid, *map(int, below)):
            kill(one)
        self.processes[name].wait()

    def logs(self) -> str:
        return "\n".join(
            f"== {p.parent.name}\n{p.read_text(errors='replace')[-1500:]}" for p in self.folder.glob("*/log")
        )

    def until(self, condition: Callable[[], Any], what: str) -> Any:
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            try:
                found = condition()
            except httpx.HTTPError:
                found = None
            if found:
                return found
            time.sleep(0.1)
        raise AssertionError(f"no {what} in {SECONDS:g} s\n{self.logs()}")


@contextmanager
def hosts(folder: Path, env: dict[str, str]) -> Iterator[Hosts]:
    found = Hosts(folder, env)
    try:
        yield found
    finally:
        for process in found.processes.values():
            if process.poll() is None:
                process.terminate()
        for name, process in found.processes.items():
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                found.kill(name)


def test_three_workers_and_two_engines_lose_one_of_each_and_no_work(
    s3_server: dict[str, Any], redis_url: str, tiny_base: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    database = new_database("postgres", tmp_path, request)
    upgrade(database)
    ports = [free_port() for _ in range(3)]
    engines = [f"http://127.0.0.1:{port}" for port in ports[1:]]
    env = {k: v for k, v in os.environ.items() if not k.startswith("LORRY_")} | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "LORRY_DATA_DIR": f"s3://lorry/{tmp_path.name}",
        "LORRY_STORAGE_OPTIONS": json.dumps(s3_server),
        "LORRY_DATABASE_URL": database,
        "LORRY_REDIS_URL": redis_url,
        "LORRY_QUEUE": f"q-{tmp_path.name}",
        "LORRY_PORT": str(ports[0]),
        "LORRY_ENGINE_URL": ",".join(engines),
        "LORRY_BASE_MODEL": str(tiny_base),
        "LORRY_TORCH_THREADS": "1",
        "LORRY_ENGINE_MAX_SEQ_LENGTH": "256",
        "LORRY_RECONCILE_SECONDS": "1",
        "LORRY_HEARTBEAT_SECONDS": "0.5",
        "LORRY_HEARTBEAT_TIMEOUT_SECONDS": "15",
    }
    with ExitStack() as stack:
        run = stack.enter_context(hosts(tmp_path, env))
        run.start("api", "api")
        for name in ("worker-1", "worker-2"):
            run.start(name, "worker", worker_queues="any")
        run.start("worker-3", "worker", worker_queues="pool:lab")
        for name, port in zip(("engine-1", "engine-2"), ports[1:], strict=True):
            run.start(name, "engine", engine_port=port)
        http = stack.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{ports[0]}", timeout=120))
        run.until(lambda: http.get("/readyz").status_code == 200, "readiness")

        rows = texts(tmp_path / "rows.jsonl", n=100).read_bytes()
        file = http.post("/v1/files", files={"file": ("rows.jsonl", rows)}).json()["id"]

        def post(name: str, **changes: Any) -> str:
            steps = {"max_steps": 60, "logging_steps": 1, "eval_steps": 1000, "save_steps": 10}
            spec = cpt_spec(tiny_base, adapter=name, dataset={"file_id": file}, training=steps, **changes)
            answer = http.post("/v1/jobs", json=spec)
            assert answer.status_code == 202, answer.text
            job: str = answer.json()["id"]
            return job

        def job(job_id: str) -> dict[str, Any]:
            found: dict[str, Any] = http.get(f"/v1/jobs/{job_id}").json()
            assert found["status"] != "failed", f"{found['error']}\n{run.logs()}"
            return found

        jobs = {"one": post("one"), "two": post("two"), "lab": post("lab", resources={"pool": "lab"})}

        def points(job_id: str) -> list[dict[str, Any]]:
            series: list[dict[str, Any]] = http.get(f"/v1/jobs/{job_id}/metrics").json()["train"]
            return series

        # A host is lost with the job that it runs; the job goes on from a checkpoint at the other one.
        run.until(lambda: any(p["step"] >= 15 for p in points(jobs["one"])), "steps of the first job")
        ran = job(jobs["one"])["runs"][-1]["worker"]
        lost = next(n for n in ("worker-1", "worker-2") if f".{run.processes[n].pid}." in ran)
        run.kill(lost)
        for job_id in jobs.values():
            run.until(lambda job_id=job_id: job(job_id)["status"] == "succeeded", "end of a job")  # type: ignore[misc]
        took = {name: [r["worker"] for r in job(job_id)["runs"]] for name, job_id in jobs.items()}
        assert all(f".{run.processes['worker-3'].pid}." in worker for worker in took["lab"])
        assert f".{run.processes[lost].pid}." not in took["one"][-1]
        series = {name: [(p["step"], p["loss"]) for p in points(job_id)] for name, job_id in jobs.items()}
        assert series["one"] == series["two"] == series["lab"], (
            "the same training, interrupted or not, at whatever host"
        )

        # What was made at hosts that no engine knows is served at once, by both engines.
        def ask(adapter: str | None, tokens: int = 8) -> httpx.Response:
            body = {"adapter": adapter, "prompt": "The tide", "max_new_tokens": tokens, "temperature": 0}
            return http.post("/generate", json=body)

        told = {name: ask(name) for name in jobs}
        assert {a.status_code for a in told.values()} == {200}, [a.text for a in told.values()]
        assert len({a.json()["text"] for a in told.values()}) == 1

        # One engine dies under load: each request is answered, or its stream ends with an error that says why.
        answers: list[tuple[int, str]] = []
        over = threading.Event()

        def client(number: int) -> None:
            name = list(jobs)[number % 3]
            while not over.is_set():
                if number % 2:
                    got = ask(name, 60)
                    answers.append((got.status_code, "whole" if got.status_code == 200 else got.text))
                    continue
                body = {"adapter": name, "prompt": "The tide", "max_new_tokens": 60, "stream": True}
                with http.stream("POST", "/generate", json=body) as stream:
                    text = stream.read().decode()
                last = text.strip().rpartition("event: ")[2].split("\n")[0] if stream.status_code == 200 else text
                answers.append((stream.status_code, last))

        threads = [threading.Thread(target=client, args=(n,)) for n in range(6)]
        for thread in threads:
            thread.start()
        run.until(lambda: len(answers) >= 12, "answers of both engines")
        run.kill("engine-1")
        before = len(answers)
        run.until(lambda: len(answers) >= before + 24, "answers of the engine that is left")
        over.set()
        for thread in threads:
            thread.join(SECONDS)
        assert {(200, "whole"), (200, "done")} <= set(answers)
        assert set(answers) <= {(200, "whole"), (200, "done"), (200, "error")}, set(answers)
        assert answers.count((200, "error")) <= 6, "only streams that had begun at the dead engine"
        assert set(answers[-6:]) <= {(200, "whole"), (200, "done")}
        assert ask(None).status_code == 200
        assert http.get("/readyz", params={"parts": "engine"}).status_code == 200

        run.start("engine-1", "engine", engine_port=ports[1])
        up = [f'lorry_engine_up{{engine="127.0.0.1:{port}"}} 1.0' for port in ports[1:]]
        run.until(lambda: all(line in http.get("/metrics").text for line in up), "the engine that is started again")
