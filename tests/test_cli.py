"""The `lorry` command, run as a user runs it: real processes, real signals."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.db import Database
from service.jobs import repository
from service.queue import JobQueue
from service.settings import Settings
from service.up import url_of
from tests.conftest import free_port

ROOT = Path(__file__).resolve().parent.parent


def environment(tmp: Path, **values: Any) -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("LORRY_")}
    env |= {"PYTHONPATH": str(ROOT), "LORRY_DATA_DIR": str(tmp / "data"), "LORRY_PORT": str(free_port())}
    return env | {f"LORRY_{k.upper()}": str(v) for k, v in values.items()}


def lorry(tmp: Path, *arguments: str, **values: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "service.cli", *arguments],
        env=environment(tmp, **values), cwd=tmp, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


class Running:
    """A command that runs until told to stop."""

    def __init__(self, tmp: Path, *arguments: str, **values: Any) -> None:
        self.env = environment(tmp, **values)
        self.url = f"http://127.0.0.1:{self.env['LORRY_PORT']}"
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "service.cli", *arguments],
            env=self.env, cwd=tmp, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(iter(self.process.stdout.readline, ""))

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def wait_for(self, condition: Callable[[], Any], what: str, seconds: float = 30) -> Any:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                found = condition()
            except httpx.HTTPError:
                found = None
            if found:
                return found
            assert self.process.poll() is None, f"it ended early:\n{self.output}"
            time.sleep(0.05)
        raise AssertionError(f"no {what} in {seconds} s:\n{self.output}")

    def listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", int(self.env["LORRY_PORT"]))) == 0

    def stop(self, number: int = signal.SIGINT, seconds: float = 30) -> int:
        self.process.send_signal(number)
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it did not stop:\n{self.output}") from None
        self._reader.join(5)
        return status

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    started: list[Running] = []

    def run(*arguments: str, **values: Any) -> Running:
        started.append(Running(tmp_path, *arguments, **values))
        return started[-1]

    yield run
    for one in started:
        one.kill()


def marked(tmp: Path) -> dict[int, str]:
    """Live processes of this test, known by its folder: in their environment, or (the queue) as working directory."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            environ, command = (entry / "environ").read_bytes(), (entry / "cmdline").read_bytes()
            folder = os.readlink(entry / "cwd")
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if (
            entry.name.isdecimal()
            and state != "Z"
            and (str(tmp).encode() in environ or Path(folder).is_relative_to(tmp))
        ):
            found[int(entry.name)] = command.replace(b"\0", b" ").decode()
    return found


def gone(tmp: Path, seconds: float = 15) -> dict[int, str]:
    """Wait until no process of this test is left; returns those that are."""
    deadline = time.monotonic() + seconds
    while (left := marked(tmp)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


# api, migrate, settings


def test_the_api_wants_a_migrated_database_and_then_serves(tmp_path: Path, running: Callable[..., Running]) -> None:
    refused = lorry(tmp_path, "api")
    assert refused.returncode == 1
    assert "run `lorry migrate`" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert lorry(tmp_path, "migrate").returncode == 0
    api = running("api")
    api.wait_for(api.listens, "answer")
    assert httpx.get(f"{api.url}/healthz").status_code == 200
    assert api.stop(signal.SIGTERM) in (0, -signal.SIGTERM)


def test_an_open_stream_does_not_keep_the_api_from_stopping(tmp_path: Path, running: Callable[..., Running]) -> None:
    lorry(tmp_path, "migrate")
    api = running("api", redis_url=f"redis://127.0.0.1:{free_port()}/0")
    api.wait_for(api.listens, "answer")
    spec = {"kind": "cpt", "adapter": "a", "dataset": {"path": "o/s", "template": {"prompt": "{text}"}}}
    job = httpx.post(f"{api.url}/v1/jobs", json=spec).json()
    with httpx.stream("GET", f"{api.url}/v1/jobs/{job['id']}/events", timeout=30) as stream:
        lines = stream.iter_lines()  # dropping it would close the connection
        assert next(lines) == "id: 1"
        began = time.monotonic()
        api.stop(signal.SIGTERM)
        assert time.monotonic() - began < 8


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.com"])
@pytest.mark.parametrize("command", ["api", "up"])
def test_a_public_address_needs_a_key(tmp_path: Path, command: str, host: str) -> None:
    refused = lorry(tmp_path, command, host=host)
    assert refused.returncode == 1
    assert "LORRY_API_KEY" in refused.stderr
    assert "LORRY_ALLOW_PUBLIC" in refused.stderr


@pytest.mark.parametrize("setting", [{"api_key": "k"}, {"allow_public": 1}])
def test_with_a_key_or_on_purpose_a_public_address_is_served(
    tmp_path: Path, running: Callable[..., Running], setting: dict[str, Any]
) -> None:
    lorry(tmp_path, "migrate")
    api = running("api", host="0.0.0.0", **setting)
    api.wait_for(api.listens, "answer")
    assert httpx.get(f"{api.url}/v1/jobs").status_code == (401 if "api_key" in setting else 200)


def test_settings_lists_every_variable_and_shows_no_secret(tmp_path: Path) -> None:
    shown = lorry(
        tmp_path, "settings", api_key="top-secret", port=1234, redis_url="redis://user:pass-word@host:6379/0",
        database_url="postgresql+psycopg://me:pass-word@host/db",
    ).stdout  # fmt: skip
    for name, field in Settings.model_fields.items():
        assert f"LORRY_{name.upper()}\n    {field.description}\n    default: " in shown
    assert "current: 1234" in shown
    assert "top-secret" not in shown
    assert "pass-word" not in shown
    assert "host:6379" in shown


def test_a_setting_that_is_wrong_is_named(tmp_path: Path) -> None:
    refused = lorry(tmp_path, "settings", port="many")
    assert refused.returncode == 1
    assert "LORRY_PORT" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert "LORRY_LOG_LEVEL" in lorry(tmp_path, "api", log_level="LOUD").stderr


def test_a_database_out_of_reach_is_said_in_words(tmp_path: Path) -> None:
    url = f"postgresql+psycopg://me@127.0.0.1:{free_port()}/db"
    for command in ("api", "migrate"):
        refused = lorry(tmp_path, command, database_url=url)
        assert refused.returncode == 1
        assert "lorry: " in refused.stderr
        assert "Traceback" not in refused.stderr


def test_version_and_help(tmp_path: Path) -> None:
    assert re.fullmatch(r"lorry \d+\.\d+\.\d+\n", lorry(tmp_path, "--version").stdout)
    text = lorry(tmp_path, "--help").stdout
    for command in ("api", "worker", "engine", "migrate", "settings", "up"):
        assert command in text
    assert lorry(tmp_path, "fly").returncode == 2


# up


def ready(up: Running, parts: str = "database,queue,workers") -> None:
    up.wait_for(lambda: "ready: http" in up.output, "readiness", 60)
    assert httpx.get(f"{up.url}/readyz", params={"parts": parts}).status_code == 200


def test_up_starts_all_parts_and_ctrl_c_leaves_no_process(tmp_path: Path, running: Callable[..., Running]) -> None:
    up = running("up", "--no-engine", "--workers", "2")
    ready(up)
    workers = up.wait_for(
        lambda: "2 registered" in httpx.get(f"{up.url}/readyz").json()["parts"]["workers"]["detail"], "second worker"
    )
    assert workers
    for prefix in ("queue    |", "api      |", "worker-1 |", "worker-2 |", "up       |"):
        assert prefix in up.output
    assert len(marked(tmp_path)) >= 6  # up, api, two workers, the queue's host and the queue
    assert up.stop() == 0
    assert gone(tmp_path) == {}
    # The API stops first, the queue last.
    order = [up.output.index(text) for text in ("Shutting down", "warm shut down", "up       | stopped")]
    assert order == sorted(order)


def test_up_serves_with_an_engine_of_its_own_even_where_another_has_the_usual_port(
    tmp_path: Path, tiny_base: Path, running: Callable[..., Running]
) -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            other.bind(("127.0.0.1", Settings.model_fields["engine_port"].default))
            other.listen()
        except OSError:
            pass  # another engine has it, which is the case in question
        up = running("up", base_model=tiny_base, torch_threads=1, engine_max_seq_length=128)
        ready(up, "database,queue,workers,engine")
        answer = httpx.post(f"{up.url}/generate", json={"prompt": "def ", "max_new_tokens": 4}, timeout=30)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] <= 4
        assert up.stop() == 0
    assert gone(tmp_path) == {}


def test_up_restarts_a_part_that_dies_and_keeps_the_queue(tmp_path: Path, running: Callable[..., Running]) -> None:
    up = running("up", "--no-engine")
    ready(up)
    for name in ("api", "worker", "queue-server"):
        pid = next(p for p, c in marked(tmp_path).items() if f"service.cli {name}" in c)
        os.kill(pid, signal.SIGKILL)
        label = {"queue-server": "queue"}.get(name, name)
        up.wait_for(lambda: f"up       | {label} ended with status -9" in up.output, f"{name}'s end")  # noqa: B023
        up.wait_for(
            lambda: any(p != pid and f"service.cli {name}" in c for p, c in marked(tmp_path).items()),  # noqa: B023
            f"{name}'s restart",
        )
        up.wait_for(
            lambda: httpx.get(f"{up.url}/readyz", params={"parts": "database,queue"}).status_code == 200, "readiness"
        )
    assert up.stop() == 0
    assert gone(tmp_path) == {}


def test_the_queue_server_writes_no_hub_token_to_disk(tmp_path: Path, running: Callable[..., Running]) -> None:
    port = free_port()
    server = running("queue-server", str(port))
    server.wait_for(lambda: "listening on" in server.output, "the queue server")
    queue = JobQueue(f"redis://127.0.0.1:{port}/0", "q")
    queue.keep_token("job_1", "hf_secret")
    assert queue.token("job_1") == "hf_secret"
    queue.redis.close()
    assert server.stop(signal.SIGTERM) == 0
    files = [p for p in (tmp_path / "data").rglob("*") if p.is_file()]
    assert files
    assert [p.name for p in files if b"hf_secret" in p.read_bytes()] == []


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.2", "http://127.0.0.2:1"),
        ("0.0.0.0", "http://127.0.0.1:1"),
        ("::", "http://127.0.0.1:1"),
        ("::1", "http://[::1]:1"),
        ("engine.lan", "http://engine.lan:1"),
    ],
)
def test_a_part_is_reached_where_it_listens(host: str, url: str) -> None:
    assert url_of(host, 1) == url


def test_up_killed_outright_takes_its_parts_with_it(tmp_path: Path, running: Callable[..., Running]) -> None:
    up = running("up", "--no-engine")
    ready(up)
    up.process.kill()
    assert gone(tmp_path, 20) == {}


def test_a_second_up_on_the_same_data_is_refused(tmp_path: Path, running: Callable[..., Running]) -> None:
    up = running("up", "--no-engine")
    ready(up)
    refused = lorry(tmp_path, "up", "--no-engine")
    assert refused.returncode == 1
    assert "another `lorry up`" in refused.stderr
    assert up.stop(signal.SIGTERM) == 0


def test_up_on_a_port_that_is_taken_is_refused(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        refused = lorry(tmp_path, "up", "--no-engine", port=taken.getsockname()[1])
    assert refused.returncode == 1
    assert "LORRY_PORT" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_up_gives_up_on_a_part_that_cannot_start(tmp_path: Path, running: Callable[..., Running]) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "redis").write_text("in the way of the queue's folder")
    up = running("up", "--no-engine")
    assert up.process.wait(60) == 1
    assert "queue does not start: giving up" in up.output
    assert gone(tmp_path) == {}


def test_jobs_queued_before_a_stop_are_there_after_the_next_start(
    tmp_path: Path, tiny_base: Path, running: Callable[..., Running]
) -> None:
    """Stopped while its worker is away, `up` finds the job in SQL and runs it: here it fails, for want of its data."""
    data = tmp_path / "set.jsonl"
    data.write_text(json.dumps({"text": "x"}) + "\n")
    lorry(tmp_path, "migrate")
    api = running("api", redis_url=f"redis://127.0.0.1:{free_port()}/0", base_model=tiny_base)
    api.wait_for(api.listens, "answer")
    file = httpx.post(f"{api.url}/v1/files", files={"file": ("set.jsonl", data.read_bytes())}).json()
    spec = {
        "kind": "cpt", "adapter": "a", "dataset": {"file_id": file["id"], "template": {"prompt": "{no_such_column}"}},
    }  # fmt: skip
    job = httpx.post(f"{api.url}/v1/jobs", json=spec).json()
    api.stop(signal.SIGTERM)
    up = running("up", "--no-engine", torch_threads=1, base_model=tiny_base)
    ready(up)
    up.wait_for(lambda: httpx.get(f"{up.url}/v1/jobs/{job['id']}").json()["status"] == "failed", "end of the job", 90)
    assert httpx.get(f"{up.url}/v1/jobs/{job['id']}").json()["error"]["code"] == "invalid_data"
    assert up.stop() == 0
    db = Database(f"sqlite:///{tmp_path / 'data' / 'lorry.db'}")
    with db.read() as session:
        assert [r.outcome for r in repository.runs(session, job["id"])] == ["failed"]
    db.dispose()
    assert gone(tmp_path) == {}


def test_the_settings_page_has_every_variable_with_its_default_and_meaning() -> None:
    page = (ROOT / "docs" / "settings.md").read_text("utf-8")
    for name, field in Settings.model_fields.items():
        default = "unset" if field.default is None else f"`{field.default}`"
        assert f"| `LORRY_{name.upper()}` | {default} | {field.description} |" in page
