"""Log lines: what they are, what they belong to, what is never in them; and a failed job's last words over HTTP."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.ids import new_id
from service.jobs import repository
from service.logs import _Json, run_started, tail
from service.reconcile import give_back
from service.settings import Settings
from tests.conftest import Api, serve
from tests.serving import engine_settings, make_adapter, register, serve_engine, until
from tests.steps import cpt, post, unique
from tests.test_cli import ROOT, Running, environment

TOKEN = "hf_" + "AbCdEfGh" * 4


@pytest.fixture
def json_lines() -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """What this process logs, as `lorry … LORRY_LOG_FORMAT=json` writes it."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Json())
    loggers = [logging.getLogger(name) for name in ("lorry.access", "lorry.jobs")]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    for logger in loggers:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)


def test_a_request_and_the_engine_s_part_of_it_are_logged_under_one_id(
    sqlite_url: str,
    make_settings: Callable[..., Settings],
    tiny_base: Path,
    tmp_path: Path,
    json_lines: Callable[[], list[dict[str, Any]]],
) -> None:
    with (
        serve_engine(engine_settings(tiny_base)) as engine,
        serve(make_settings(database_url=sqlite_url, engine_url=engine.url, base_model=str(tiny_base))) as api,
    ):
        name = unique()
        register(api.db, name, make_adapter(tiny_base, tmp_path / "adapter", r=4), str(tiny_base))
        for path, body in (
            ("/generate", {"adapter": name, "prompt": "a", "max_new_tokens": 2, "stream": True}),
            ("/v1/completions", {"model": name, "prompt": "a", "max_tokens": 2}),
        ):
            answer = api.http.post(path, json=body, headers={"X-Request-Id": f"mine{path}"})
            assert answer.status_code == 200, answer.text
            assert answer.headers["x-request-id"] == f"mine{path}"
        failed = engine.http.post("/v1/completions", json={"model": "no", "prompt": "a"}, headers={"X-Request-Id": "e"})
        assert failed.headers["x-request-id"] == "e"
        until(lambda: len(json_lines()) >= 6, 60)  # a line follows its answer
    lines = json_lines()
    served = {(line["request"], line["path"], line["status"]) for line in lines}
    assert served >= {
        ("mine/generate", "/generate", 200),
        ("mine/generate", "/v1/load_lora_adapter", 200),
        ("mine/generate", "/v1/completions", 200),
        ("mine/v1/completions", "/v1/completions", 200),
        ("e", "/v1/completions", 404),
    }
    assert all({"time", "level", "logger", "message", "pid", "method", "ms"} <= line.keys() for line in lines)
    assert sum(line["request"] == "mine/v1/completions" for line in lines) == 2  # the API's and the engine's


def test_a_path_cannot_write_lines_of_its_own(sqlite_api: Api, json_lines: Callable[[], list[dict[str, Any]]]) -> None:
    sqlite_api.http.get("/v1/files/x%0d%0aforged")
    until(lambda: json_lines() != [], 60)
    assert [line["path"] for line in json_lines()] == ["/v1/files/x%0d%0aforged"]


CRASH = """
import logging, os, signal, sys, warnings
from pathlib import Path
from service.logs import configure, hide, job_log, run_started
from service.settings import Settings

configure(Settings(), "worker")
hide("secret-of-its-own")
log = logging.getLogger("lorry.worker")
warnings.warn("a library's warning", stacklevel=1)
log.info("before")
with job_log(Path(sys.argv[1]), job="job_1", attempt=2, run="run_2"):
    log.info(run_started("job_1", 2, "run_2"))
    log.info("token %s and secret-of-its-own", sys.argv[2])
    logging.getLogger("other.library").warning("a library's line")
    try:
        raise ValueError("at https://me:hunter22@host/ with " + sys.argv[2])
    except ValueError:
        log.exception("it failed")
    print("printed, with Bearer " + sys.argv[2], flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)
"""


@pytest.fixture(scope="module")
def crashed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The log of a job whose process crashed in native code, and what its worker's terminal saw."""
    folder = tmp_path_factory.mktemp("crash")
    path = folder / "log.txt"
    path.write_text("an older attempt\n")
    env = environment(folder, log_format="json")
    done = subprocess.run(
        [sys.executable, "-c", CRASH, str(path), TOKEN],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == -11, done.stderr
    return path, done.stderr


def test_a_job_s_lines_go_to_its_log_and_with_their_ids_to_the_worker_s(crashed: tuple[Path, str]) -> None:
    path, said = crashed
    lines = [json.loads(line) for line in said.splitlines()]
    assert lines.pop(0)["logger"] == "py.warnings"
    ids = [{k: line.get(k) for k in ("part", "job", "attempt", "run")} for line in lines]
    of_job = {"part": "worker", "job": "job_1", "attempt": 2, "run": "run_2"}
    assert ids == [{**of_job, "job": None, "attempt": None, "run": None}, of_job, of_job, of_job]
    assert [line["message"] for line in lines][-1] == "it failed"
    assert "ValueError" in lines[-1]["exception"]
    text = path.read_text()
    assert "a library's line" in text
    assert "Segmentation fault" in text, "the stack of a crash in native code"


def test_no_secret_is_in_a_log(crashed: tuple[Path, str]) -> None:
    path, said = crashed
    for secret in (TOKEN, "secret-of-its-own", "hunter22"):
        assert secret not in said
        assert secret not in "\n".join(tail(path))
    assert "token *** and ***" in path.read_text()


def test_a_tail_is_of_one_run_and_not_too_long(crashed: tuple[Path, str], tmp_path: Path) -> None:
    path, _ = crashed
    assert tail(path)[0] == "an older attempt"
    assert tail(path, "run_2")[0].endswith(run_started("job_1", 2, "run_2"))
    long = tmp_path / "long.txt"
    long.write_text("".join(f"line {n}\n" for n in range(1000)) + "x" * 10_000 + "\x00\n")
    found = tail(long, "run_9")
    assert len(found) == 200
    assert len(found[-1]) == 2000
    assert tail(tmp_path / "none.txt") == []


def test_a_job_whose_process_was_killed_says_why_over_http(api: Api) -> None:
    from worker.run import describe

    job = post(api, cpt(unique()))["id"]
    path = api.settings.job_dir(job) / "log.txt"
    path.parent.mkdir(parents=True)
    for attempt in (1, 2, 3):
        run_id = new_id("run")
        with api.db.write() as session:
            assert repository.claim(session, job, run_id, "a worker") is not None
        with open(path, "a") as file:
            file.write(run_started(job, attempt, run_id) + "\n")
            file.writelines(f"attempt {attempt} line {n}\n" for n in range(50 if attempt == 1 else 300))
        give_back(api.db, api.queue, api.settings, job, run_id, code="worker_killed", reason=describe(9))
    body = api.http.get(f"/v1/jobs/{job}").json()
    assert (body["status"], body["error"]["code"]) == ("failed", "worker_killed")
    assert body["error"]["message"].startswith("attempt 3 of 3: its process was killed by SIGKILL")
    assert "memory" in body["error"]["message"]
    tails = [run["record"]["log_tail"] for run in body["runs"]]
    assert [len(t) for t in tails] == [51, 200, 200]
    assert tails[1][-1] == "attempt 2 line 299"
    assert api.http.get(f"/v1/jobs/{job}/log").text.endswith("attempt 3 line 299\n")
    path.unlink()  # as retention does; the record stays
    kept = api.http.get(f"/v1/jobs/{job}/log").text.splitlines()
    assert kept == tails[2]


@pytest.mark.parametrize(
    ("status", "oom", "says"),
    [
        (9, False, "SIGKILL; if nobody did this, the kernel may have ended it for want of memory"),
        (9, True, "SIGKILL for want of memory"),
        (11, False, "SIGSEGV: a fault in native code"),
        (15, True, "killed by SIGTERM"),
        (3 << 8, False, "exit code 3"),
        (None, False, "without a word"),
    ],
)
def test_how_a_process_ended_is_said_in_words(status: int | None, oom: bool, says: str) -> None:
    from worker.run import describe

    assert says in describe(status, oom=oom)


RELAY = """
import subprocess, sys, threading
from service.logs import configure
from service.settings import Settings
from service.up import _relay

configure(Settings(_env_file=None), "up")
parts = [subprocess.Popen([sys.executable, "-c", "for n in range(3000): print(n)"], stdout=-1, text=True) for _ in "1234"]
threads = [threading.Thread(target=_relay, args=(f"part-{i}", part)) for i, part in enumerate(parts)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""


def test_lines_of_parts_that_write_at_once_stay_apart(tmp_path: Path) -> None:
    env = environment(tmp_path) | {"LORRY_LOG_FORMAT": "json", "PYTHONUNBUFFERED": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RELAY], env=env, capture_output=True, text=True, timeout=120, check=True
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    for i in range(4):
        assert [int(line["message"]) for line in lines if line["part"] == f"part-{i}"] == list(range(3000))


def test_up_writes_json_lines_alone_and_no_secret(tiny_base: Path, tmp_path: Path) -> None:
    key = "key-that-nobody-may-see"
    running = Running(tmp_path, "up", "--no-engine", log_format="json", api_key=key, log_level="DEBUG")
    try:
        http = httpx.Client(base_url=running.url, headers={"Authorization": f"Bearer {key}"}, timeout=60)
        ready = {"parts": "database,queue,workers"}
        running.wait_for(lambda: http.get("/readyz", params=ready).status_code == 200, "readiness", 120)
        bad = http.post("/v1/files", files={"file": ("bad.jsonl", b'{"text": 1}\n')}).json()["id"]
        spec = cpt(unique(), model__name=str(tiny_base), dataset__path=..., dataset__file_id=bad)
        headers = {"X-HF-Token": TOKEN, "X-Request-Id": "the-first"}
        job = http.post("/v1/jobs", json=spec, headers=headers).json()["id"]
        running.wait_for(lambda: http.get(f"/v1/jobs/{job}").json()["status"] == "failed", "failure", 240)
        body = http.get(f"/v1/jobs/{job}").json()
        assert running.stop(seconds=120) == 0
    finally:
        running.kill()
    lines = [json.loads(line) for line in running.lines]
    assert all({"time", "level", "logger", "message", "part"} <= line.keys() for line in lines)
    assert {line["part"] for line in lines} >= {"up", "api", "worker", "queue"}
    made = [line for line in lines if line.get("job") == job and line["part"] == "api"]
    assert [line["request"] for line in made if "made" in line["message"]] == ["the-first"]
    posted = [line for line in lines if line["logger"] == "lorry.access" and line["request"] == "the-first"]
    assert [(line["method"], line["path"], line["status"]) for line in posted] == [("POST", "/v1/jobs", 202)]
    # Lines of the run itself; the parent has some of the job's before it is claimed, which have no run yet.
    worker = [line for line in lines if line.get("job") == job and line["part"] == "worker" and "run" in line]
    assert {(line["attempt"], line["run"].partition("_")[0]) for line in worker} == {(1, "run")}
    assert body["runs"][0]["record"]["log_tail"] != []
    stored = b"".join(p.read_bytes() for p in (tmp_path / "data").rglob("*") if p.is_file())
    for secret in (key, TOKEN):
        assert secret not in running.output
        assert secret.encode() not in stored


def test_text_is_for_people(tmp_path: Path) -> None:
    code = CRASH.partition("with job_log")[0]
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(tmp_path), capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stderr.endswith(" INFO lorry.worker: before\n")
    assert str(ROOT) not in done.stderr
