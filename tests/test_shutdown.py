"""Stopping the API and the engine with everything open, and restarting the API under load."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from sqlalchemy import func, select

from service.db import Database
from service.jobs import repository
from service.migrate import upgrade
from service.models import JobRow
from service.settings import Settings
from tests.conftest import free_port, serve
from tests.serving import EngineServer, engine_settings, serve_engine, until
from tests.steps import cpt, post, start, unique
from tests.test_api_events import parse
from tests.test_cli import ROOT, Running

LONG = {"max_new_tokens": 240, "temperature": 0, "prompt": "x"}


@pytest.fixture
def slow_engine(tiny_base: Path) -> Iterator[EngineServer]:
    """An engine whose steps are so slow that nothing of LONG ends by itself."""
    with serve_engine(engine_settings(tiny_base)) as engine:
        forward = engine.engine.runner.forward
        engine.engine.runner.forward = lambda step: (time.sleep(0.3), forward(step))[1]
        yield engine


def lines_of(url: str, body: dict[str, Any] | None, into: list[str], *, path: str) -> None:
    """Read a stream to its end, line by line."""
    with httpx.stream("POST" if body else "GET", f"{url}{path}", json=body, timeout=90) as answer:
        into.extend([str(answer.status_code)])
        for line in answer.iter_lines():
            into.append(line)


def half_an_upload(url: str) -> socket.socket:
    """A connection on which an upload has begun and does not go on."""
    host, _, port = url.removeprefix("http://").partition(":")
    sock = socket.create_connection((host, int(port)), timeout=90)
    part = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.txt"\r\n\r\nsome text'
    head = f"POST /v1/files HTTP/1.1\r\nHost: {host}\r\nContent-Type: multipart/form-data; boundary=b\r\n"
    sock.sendall(f"{head}Content-Length: 100000\r\n\r\n".encode() + part)
    return sock


def read_all(sock: socket.socket) -> str:
    received = b""
    while chunk := sock.recv(65536):
        received += chunk
    return received.decode()


def test_open_requests_may_finish_and_a_second_signal_ends_them_with_an_error_they_can_act_on(
    slow_engine: EngineServer, sqlite_url: str, make_settings: Callable[..., Settings]
) -> None:
    settings = make_settings(database_url=sqlite_url, engine_url=slow_engine.url)
    with serve(settings) as api, ThreadPoolExecutor(8) as pool:
        api.server.grace = 600
        job = post(api, cpt(unique()))["id"]
        native: list[str] = []
        chat: list[str] = []
        follower: list[str] = []
        streams = [
            pool.submit(lines_of, api.url, {**LONG, "stream": True}, native, path="/generate"),
            pool.submit(
                lines_of, api.url, {"model": slow_engine.base, "prompt": "x", "max_tokens": 240, "stream": True}, chat,
                path="/v1/completions",
            ),
            pool.submit(lines_of, api.url, None, follower, path=f"/v1/jobs/{job}/events"),
        ]  # fmt: skip
        whole = pool.submit(httpx.post, f"{api.url}/generate", json=LONG, timeout=90)
        upload = half_an_upload(api.url)
        until(lambda: len(native) > 1 and len(chat) > 1 and len(follower) > 1)
        until(lambda: len(slow_engine.engine.scheduler.running) == 3)
        until(lambda: list(settings.files_dir.glob(".upload-*")))

        api.server.handle_exit(signal.SIGTERM, None)
        # A follower can go on elsewhere at once; its stream ends whole, with the hint to come again.
        streams[2].result(timeout=60)
        assert follower[:3] == ["200", "id: 1", "event: status"]
        assert "retry: 1000" in follower
        with pytest.raises(httpx.TransportError):
            until(lambda: httpx.get(f"{api.url}/healthz") is None)
        seen = len(native)
        until(lambda: len(native) > seen)  # the others go on

        api.server.handle_exit(signal.SIGTERM, None)
        for stream in streams[:2]:
            stream.result(timeout=60)
        assert native[-3] == "event: error"
        assert json.loads(native[-2].removeprefix("data: "))["error"]["code"] == "shutting_down"
        assert chat[-2:] == ["data: [DONE]", ""]
        assert json.loads(chat[-4].removeprefix("data: "))["error"]["code"] == "shutting_down"
        answer = whole.result(timeout=60)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")
        assert int(answer.headers["retry-after"]) >= 1
        refused = read_all(upload)
        assert refused.startswith("HTTP/1.1 503 ")
        assert "shutting_down" in refused
        until(lambda: not list(settings.files_dir.glob("*")))
        until(slow_engine.idle)  # what was generated for them has ended too


def test_the_engine_s_open_requests_end_with_an_error_at_a_second_signal(slow_engine: EngineServer) -> None:
    slow_engine.server.grace = 600
    body = {"model": slow_engine.base, "prompt": "x", "max_tokens": 200, "ignore_eos": True}
    lines: list[str] = []
    with ThreadPoolExecutor(2) as pool:
        stream = pool.submit(lines_of, slow_engine.url, {**body, "stream": True}, lines, path="/v1/completions")
        whole = pool.submit(httpx.post, f"{slow_engine.url}/v1/completions", json=body, timeout=90)
        until(lambda: len(lines) > 1 and len(slow_engine.engine.scheduler.running) == 2)
        slow_engine.server.handle_exit(signal.SIGTERM, None)
        until(lambda: slow_engine.engine.draining)
        seen = len(lines)
        until(lambda: len(lines) > seen)
        slow_engine.server.handle_exit(signal.SIGINT, None)
        stream.result(timeout=60)
        answer = whole.result(timeout=60)
    assert json.loads(lines[-4].removeprefix("data: "))["error"]["code"] == "shutting_down"
    assert lines[-2:] == ["data: [DONE]", ""]
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")


def test_requests_are_answered_though_the_engine_s_step_does_not_end(slow_engine: EngineServer) -> None:
    slow_engine.server.grace, slow_engine.server.config.timeout_graceful_shutdown = 0.1, 1
    gate, forward = threading.Event(), slow_engine.engine.runner.forward
    body = {"model": slow_engine.base, "prompt": "x", "max_tokens": 200, "ignore_eos": True}
    lines: list[str] = []
    with ThreadPoolExecutor(2) as pool:
        try:
            stream = pool.submit(lines_of, slow_engine.url, {**body, "stream": True}, lines, path="/v1/completions")
            whole = pool.submit(httpx.post, f"{slow_engine.url}/v1/completions", json=body, timeout=90)
            until(lambda: len(lines) > 1 and len(slow_engine.engine.scheduler.running) == 2)
            slow_engine.engine.runner.forward = lambda step: (gate.wait(120), forward(step))[1]
            slow_engine.server.handle_exit(signal.SIGTERM, None)
            stream.result(timeout=60)
            answer = whole.result(timeout=60)
        finally:
            gate.set()
    assert json.loads(lines[-4].removeprefix("data: "))["error"]["code"] == "shutting_down"
    assert lines[-2:] == ["data: [DONE]", ""]
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")


def test_a_process_that_waits_for_something_is_ended_all_the_same() -> None:
    code = """
import threading
from fastapi import FastAPI
from service.server import Server, serve
app = FastAPI()
@app.get("/")
def hang():
    print("hangs", flush=True)
    threading.Event().wait()
serve(Server(app, grace=0.2, stalled=9, begin=lambda: None, end=lambda: None, hard=3), "127.0.0.1", %d)
"""
    port = free_port()
    process = subprocess.Popen([sys.executable, "-c", code % port], cwd=ROOT, stdout=subprocess.PIPE, text=True)

    def ask() -> bool:
        try:
            httpx.get(f"http://127.0.0.1:{port}/", timeout=0.5)
        except httpx.ConnectError:
            return False
        except httpx.TimeoutException:
            pass
        return True

    until(ask)
    assert process.stdout is not None
    assert process.stdout.readline() == "hangs\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 1


@dataclass
class Client:
    """Repeats what fails on the way or is answered 503, as any client should."""

    url: str
    retries: int = 0
    done: threading.Event = field(default_factory=threading.Event)

    def send(self, http: httpx.Client, method: str, path: str, **kwargs: Any) -> httpx.Response:
        deadline = time.monotonic() + 60
        while True:
            try:
                answer = http.request(method, self.url + path, **kwargs)
                if answer.status_code != 503:
                    return answer
                assert time.monotonic() < deadline, f"503 for a minute: {answer.text}"
            except httpx.TransportError:
                if time.monotonic() > deadline:
                    raise
            self.retries += 1
            time.sleep(0.02)

    def post_jobs(self, made: dict[str, str]) -> None:
        with httpx.Client(timeout=60) as http:
            while not self.done.wait(0.01):
                key = unique()
                answer = self.send(http, "POST", "/v1/jobs", json=cpt(key), headers={"Idempotency-Key": key})
                assert answer.status_code == 202, answer.text
                made[key] = answer.json()["id"]

    def get_jobs(self) -> int:
        number = 0
        with httpx.Client(timeout=60) as http:
            while not self.done.wait(0.02):
                assert self.send(http, "GET", "/v1/jobs").status_code == 200
                number += 1
        return number

    def follow(self, job_id: str, seen: list[int]) -> int:
        """Collects ids of events, coming back with Last-Event-ID until the job's end; returns how often it came."""
        deadline = time.monotonic() + 120
        came = 0
        while time.monotonic() < deadline:
            headers = {"Last-Event-ID": str(seen[-1])} if seen else {}
            came += 1
            try:
                url = f"{self.url}/v1/jobs/{job_id}/events"
                with httpx.stream("GET", url, headers=headers, timeout=60) as answer:
                    assert answer.status_code == 200
                    for number, kind, data in parse(answer.iter_lines()):
                        seen.append(number)
                        if kind == "status" and data["status"] == "succeeded":
                            return came
            except httpx.TransportError:
                time.sleep(0.02)
        raise AssertionError("the job's end did not come")


def test_the_api_restarted_under_load_loses_and_repeats_nothing(tmp_path: Path, redis_url: str) -> None:
    values = {
        "redis_url": redis_url, "queue": unique("q"), "port": free_port(), "reuse_port": 1, "shutdown_seconds": 1,
        "heartbeat_timeout_seconds": 600,
    }  # fmt: skip
    url = f"sqlite:///{tmp_path / 'data' / 'lorry.db'}"
    (tmp_path / "data").mkdir()
    upgrade(url)
    db = Database(url)
    started: list[Running] = []

    def api() -> Running:
        started.append(Running(tmp_path, "api", **values))
        started[-1].wait_for(lambda: "listening on" in started[-1].output, "start", 60)
        return started[-1]

    try:
        old = api()
        client = Client(old.url)
        with ThreadPoolExecutor(8) as pool:
            try:
                job = str(httpx.post(f"{old.url}/v1/jobs", json=cpt("followed")).json()["id"])
                run = start(SimpleNamespace(db=db), job)  # type: ignore[arg-type]
                made: list[dict[str, str]] = [{}, {}]
                seen: list[list[int]] = [[] for _ in range(3)]
                posts = [pool.submit(client.post_jobs, m) for m in made]
                gets = pool.submit(client.get_jobs)
                followers = [pool.submit(client.follow, job, s) for s in seen]

                def write() -> None:
                    while not client.done.wait(0.02):
                        with db.write() as session:
                            repository.add_event(session, job, "log", {"message": "…"})

                writer = pool.submit(write)
                for _ in range(2):
                    new = api()
                    stuck = half_an_upload(old.url)  # at either of the two: cut short with 503, or it goes on
                    assert old.stop(signal.SIGTERM, 60) == 0, old.output
                    stuck.close()
                    number = len(made[0])
                    until(lambda number=number: len(made[0]) > number + 2)
                    old = new
            finally:  # else those that go on till then would be waited for
                client.done.set()
            writer.result(60)
            with db.write() as session:
                assert repository.transition(session, job, ["running"], "succeeded", run_id=run)
            for future in posts:
                future.result(60)
            assert gets.result(60) > 0
            came = [f.result(60) for f in followers]
        with db.read() as session:
            head = session.get_one(JobRow, job).event_seq
            ids = {name: id for name, id in session.execute(select(JobRow.adapter, JobRow.id).where(JobRow.id != job))}
            jobs = session.scalar(select(func.count()).select_from(JobRow))
        assert all(s == list(range(1, head + 1)) for s in seen)
        assert min(came) > 1
        assert ids == made[0] | made[1]
        assert jobs == len(ids) + 1, "one job for each POST, however often it was sent"
        assert not any("Traceback" in one.output for one in started), "".join(one.output for one in started)
    finally:
        for one in started:
            one.kill()
        db.dispose()
