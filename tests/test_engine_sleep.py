"""The engine gives its memory up for a job and takes it back: what becomes of requests meanwhile, and the API in front."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from service.settings import Settings
from tests.conftest import Api, serve
from tests.serving import KINDS, EngineServer, engine_settings, make_adapter, serve_engine, until
from worker.engine import sleep as sleep_module

LONG = {"prompt": "def main(", "max_tokens": 60, "ignore_eos": True}


@pytest.fixture(scope="module")
def adapters(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {k: make_adapter(tiny_base, folder / k, seed=i, **KINDS[k]) for i, k in enumerate(("small", "full"))}


@pytest.fixture(scope="module")
def served(tiny_base: Path, adapters: dict[str, Path]) -> Iterator[EngineServer]:
    with serve_engine(engine_settings(tiny_base, engine_max_batch=2, engine_max_queue=4)) as engine:
        for name, folder in adapters.items():
            engine.load(name, folder)
        yield engine


@pytest.fixture
def engine(served: EngineServer) -> Iterator[EngineServer]:
    """Awake and idle before and after."""
    until(lambda: status(served) == "ok" and served.idle())
    yield served
    for owner in ("a", "b"):
        served.http.post("/v1/wake", json={"owner": owner})
    until(lambda: status(served) == "ok" and served.idle())


def status(engine: EngineServer) -> str:
    answer = engine.http.get("/health")
    assert answer.status_code == 200
    return str(answer.json()["status"])


def lie_down(engine: EngineServer, owner: str = "a", *, lease: float = 120, grace: float = 0, **more: Any) -> Any:
    body = {"owner": owner, "lease_seconds": lease, "grace_seconds": grace, **more}
    return engine.http.post("/v1/sleep", json=body)


def get_up(engine: EngineServer, owner: str = "a") -> None:
    assert engine.http.post("/v1/wake", json={"owner": owner}).status_code == 200


def refused(engine: EngineServer) -> httpx.Response:
    return engine.http.post("/v1/completions", json={"model": engine.base, "prompt": "x", "max_tokens": 1})


def slow_down(engine: EngineServer, patch: pytest.MonkeyPatch, seconds: float = 0.05) -> None:
    forward = engine.engine.runner.forward
    patch.setattr(engine.engine.runner, "forward", lambda step: (time.sleep(seconds), forward(step))[1])


class Stream:
    """A completion that is read in a thread: `text` grows, `error` is an error event's code."""

    def __init__(self, engine: EngineServer, **body: Any) -> None:
        self.pieces: list[str] = []
        self.error: str | None = None
        self._client = httpx.Client(base_url=engine.url, timeout=120)
        body = {"model": engine.base, "temperature": 0, "stream": True, **LONG, **body}
        self._response = self._client.send(
            self._client.build_request("POST", "/v1/completions", json=body), stream=True
        )
        assert self._response.status_code == 200, self._response.read()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            for line in self._response.iter_lines():
                if line.startswith("data: {"):
                    body = json.loads(line.removeprefix("data: "))
                    if "error" in body:
                        self.error = body["error"]["code"]
                    self.pieces += [c["text"] for c in body.get("choices", ())]
        except httpx.HTTPError:
            pass

    def leave(self) -> None:
        # Not close(): the thread that reads holds the socket.
        self._response.extensions["network_stream"].get_extra_info("socket").shutdown(socket.SHUT_RDWR)
        self._thread.join(20)
        self._client.close()

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    def text(self) -> str:
        self._thread.join(60)
        assert self.ended
        self._client.close()
        return "".join(self.pieces)


def settled(count: Callable[[], int]) -> int:
    """A count once it has stood still for half a second: what was sent before may still be on its way."""
    value = count()
    for _ in range(40):
        time.sleep(0.5)
        before, value = value, count()
        if value == before:
            return value
    raise AssertionError(f"still counting: {value}")


@pytest.mark.parametrize("params", [{}, {"model": "full"}, {"model": "small", "temperature": 1.0, "seed": 5}])
def test_a_stream_pauses_without_memory_and_goes_on_to_the_same_text(
    engine: EngineServer, adapters: dict[str, Path], params: dict[str, Any]
) -> None:
    expected = engine.complete(**{**LONG, **params})["choices"][0]["text"]
    cache = engine.engine.runner.cache
    with pytest.MonkeyPatch.context() as patch:
        slow_down(engine, patch)
        stream = Stream(engine, **params)
        until(lambda: len(stream.pieces) > 5)
        assert lie_down(engine).json() == {"asleep": True}
    steps, pieces = engine.engine.steps, settled(lambda: len(stream.pieces))
    assert not cache._keys
    assert not cache._values
    assert status(engine) == "asleep"
    assert refused(engine).status_code == 503
    assert refused(engine).json()["error"]["code"] == "engine_asleep"
    load = engine.http.post(
        "/v1/load_lora_adapter", json={"lora_name": "new", "lora_path": str(adapters["small"])}
    )  # would take memory
    assert (load.status_code, load.json()["error"]["code"]) == (503, "engine_asleep")
    assert engine.http.get("/v1/models").status_code == 200
    assert "lorry_engine_sleeping 1.0" in engine.http.get("/metrics").text
    assert (engine.engine.steps, len(stream.pieces)) == (steps, pieces)
    assert not stream.ended
    get_up(engine)
    assert stream.text() == expected
    assert stream.error is None
    assert status(engine) == "ok"
    assert engine.complete(**{**LONG, **params})["choices"][0]["text"] == expected


def test_requests_that_end_within_the_grace_period_are_not_paused(engine: EngineServer) -> None:
    before = engine.engine.metrics.paused._value.get()
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(4) as pool:
        slow_down(engine, patch, 0.02)
        asked = [pool.submit(engine.complete, prompt=f"{i}", max_tokens=10, ignore_eos=True) for i in range(3)]
        until(lambda: len(engine.engine.scheduler.running) == 2 and len(engine.engine.scheduler.waiting) == 1)
        answer = pool.submit(lie_down, engine, grace=60)
        until(lambda: status(engine) == "asleep")
        assert refused(engine).json()["error"]["code"] == "engine_asleep", "while the others end"
        assert answer.result().json() == {"asleep": True}
        assert all(a.result()["usage"]["completion_tokens"] == 10 for a in asked), "those that waited, too"
    assert engine.engine.metrics.paused._value.get() == before


def test_what_waits_when_the_engine_lies_down_is_answered_after_it_got_up(engine: EngineServer) -> None:
    with pytest.MonkeyPatch.context() as patch:
        slow_down(engine, patch)
        streams = [Stream(engine, prompt=f"p{i}", max_tokens=30) for i in range(4)]
        until(lambda: len(engine.engine.scheduler.waiting) == 2)
        assert lie_down(engine).json() == {"asleep": True}
    assert len(engine.engine.scheduler.waiting) == 4
    get_up(engine)
    texts = [stream.text() for stream in streams]
    assert texts == [
        engine.complete(**{**LONG, "prompt": f"p{i}", "max_tokens": 30})["choices"][0]["text"] for i in range(4)
    ]


def test_a_lease_that_nobody_renews_runs_out(engine: EngineServer) -> None:
    assert lie_down(engine, lease=1).json() == {"asleep": True}
    for _ in range(4):
        assert lie_down(engine, lease=1).json() == {"asleep": True}
        time.sleep(0.4)
        assert status(engine) == "asleep", "renewed"
    until(lambda: status(engine) == "ok", 20)
    assert engine.complete(prompt="x", max_tokens=1)


def test_it_sleeps_until_the_last_lease_has_ended(engine: EngineServer) -> None:
    lie_down(engine, "a")
    lie_down(engine, "b")
    get_up(engine, "a")
    get_up(engine, "a")  # nothing more happens
    assert lie_down(engine, "b").json() == {"asleep": True}
    assert refused(engine).status_code == 503
    get_up(engine, "b")
    until(lambda: status(engine) == "ok")


def test_retry_after_says_when_the_job_is_expected_to_end(engine: EngineServer) -> None:
    lie_down(engine, "a", lease=100)
    assert 90 <= int(refused(engine).headers["retry-after"]) <= 100, "for lack of better, the lease"
    lie_down(engine, "a", lease=100, expected_seconds=500)
    assert 490 <= int(refused(engine).headers["retry-after"]) <= 500
    lie_down(engine, "b", lease=100, expected_seconds=900)
    assert 890 <= int(refused(engine).headers["retry-after"]) <= 900
    get_up(engine, "b")
    lie_down(engine, "a", lease=100, expected_seconds=0)
    assert int(refused(engine).headers["retry-after"]) == sleep_module.SHORTEST
    lie_down(engine, "a", lease=100, expected_seconds=1e6)
    assert int(refused(engine).headers["retry-after"]) == sleep_module.LONGEST


def test_a_client_that_leaves_while_the_engine_sleeps_is_forgotten(engine: EngineServer) -> None:
    with pytest.MonkeyPatch.context() as patch:
        slow_down(engine, patch)
        stream = Stream(engine)
        until(lambda: len(stream.pieces) > 2)
        lie_down(engine)
    assert engine.engine.scheduler.has_work()
    stream.leave()
    until(lambda: not engine.engine.scheduler.has_work())
    assert status(engine) == "asleep"


def test_memory_that_cannot_be_given_up_is_kept_and_requests_go_on(
    engine: EngineServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: Any) -> None:
        raise RuntimeError("no room in the host's memory")

    expected = engine.complete(**LONG)["choices"][0]["text"]
    monkeypatch.setattr(sleep_module, "move", no_room)
    with pytest.MonkeyPatch.context() as patch:
        slow_down(engine, patch)
        stream = Stream(engine)
        until(lambda: len(stream.pieces) > 2)
        threading.Timer(0.5, monkeypatch.undo).start()  # and then what was moved can be had back
        monkeypatch.setattr(sleep_module, "RETRY", 0.1)
        answer = lie_down(engine)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_cannot_sleep")
    assert "no room in the host's memory" in answer.json()["error"]["message"]
    assert stream.text() == expected
    assert status(engine) == "ok", "though the lease is open"
    get_up(engine)
    assert lie_down(engine).json() == {"asleep": True}, "the next job may have more luck"


def test_memory_that_is_not_free_yet_is_waited_for(engine: EngineServer, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, tries = engine.engine.runner.cache, []
    allocate = cache.allocate

    def out_of_memory(*args: Any) -> None:
        tries.append(1)
        if len(tries) < 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        allocate(*args)

    monkeypatch.setattr(sleep_module, "RETRY", 0.1)
    monkeypatch.setattr(cache, "allocate", out_of_memory)
    lie_down(engine)
    get_up(engine)
    until(lambda: len(tries) == 1)
    assert refused(engine).json()["error"]["code"] == "engine_asleep"
    until(lambda: status(engine) == "ok")
    assert len(tries) == 3
    assert engine.complete(prompt="x", max_tokens=1)


def test_another_job_may_come_while_the_engine_has_not_got_its_memory_back(
    engine: EngineServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[int] = []

    def out_of_memory(*args: Any) -> None:
        tries.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sleep_module, "RETRY", 0.1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.engine.runner.cache, "allocate", out_of_memory)
        lie_down(engine)
        get_up(engine)
        until(lambda: len(tries) > 1)
        assert lie_down(engine, "b").json() == {"asleep": True}
        assert not engine.engine.runner.cache._keys
    get_up(engine, "b")
    until(lambda: status(engine) == "ok")


def test_an_engine_that_is_told_to_end_ends_asleep(tiny_base: Path) -> None:
    with serve_engine(engine_settings(tiny_base, shutdown_seconds=1)) as engine:
        with pytest.MonkeyPatch.context() as patch:
            slow_down(engine, patch)
            stream = Stream(engine)
            until(lambda: len(stream.pieces) > 2)
            lie_down(engine)
        engine.server.should_exit = True
        stream.text()
        assert stream.error == "shutting_down"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "owner"),
        ({"owner": "a", "lease_seconds": 0}, "lease_seconds"),
        ({"owner": "a", "lease_seconds": 1e9}, "lease_seconds"),
        ({"owner": "a", "grace_seconds": -1}, "grace_seconds"),
    ],
)
def test_a_lease_that_makes_no_sense_is_refused(engine: EngineServer, body: dict[str, Any], param: str) -> None:
    answer = engine.http.post("/v1/sleep", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, param)
    assert status(engine) == "ok"


# The API in front


@pytest.fixture(scope="module")
def other(tiny_base: Path) -> Iterator[EngineServer]:
    with serve_engine(engine_settings(tiny_base)) as engine:
        yield engine


def over(*engines: EngineServer, make_settings: Callable[..., Settings], url: str) -> Any:
    urls = ",".join(engine.url for engine in engines)
    return serve(make_settings(database_url=url, engine_url=urls, base_model=engines[0].base))


def generate(api: Api, **body: Any) -> httpx.Response:
    return api.http.post("/generate", json={"prompt": "import os", "max_new_tokens": 4, **body})


def test_the_api_passes_on_that_a_lone_engine_sleeps(
    engine: EngineServer, sqlite_url: str, make_settings: Callable[..., Settings]
) -> None:
    with over(engine, make_settings=make_settings, url=sqlite_url) as api:
        assert generate(api).status_code == 200
        lie_down(engine, expected_seconds=400)
        answer = generate(api)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_asleep")
        assert 390 <= int(answer.headers["retry-after"]) <= 400
        chat = {"model": engine.base, "messages": [{"role": "user", "content": "x"}], "stream": True}
        assert api.http.post("/v1/chat/completions", json=chat).status_code == 503
        ready = api.http.get("/readyz", params={"parts": "engine"})
        assert ready.status_code == 200
        assert "asleep" in ready.json()["parts"]["engine"]["detail"]
        name = engine.url.removeprefix("http://")
        assert f'lorry_engine_asleep{{engine="{name}"}} 1.0' in api.http.get("/metrics").text
        get_up(engine)
        until(lambda: generate(api).status_code == 200)
        until(lambda: f'lorry_engine_asleep{{engine="{name}"}} 0.0' in api.http.get("/metrics").text)


def test_an_engine_that_is_awake_answers_for_one_that_sleeps_and_takes_over_what_has_not_begun(
    engine: EngineServer, other: EngineServer, sqlite_url: str, make_settings: Callable[..., Settings]
) -> None:
    up = f'lorry_engine_up{{engine="{other.url.removeprefix("http://")}"}} '
    with (
        over(engine, other, make_settings=make_settings, url=sqlite_url) as api,
        ThreadPoolExecutor(4) as pool,
        httpx.Client(base_url=api.url, timeout=60) as http,
    ):
        body = {"prompt": "import os", "max_new_tokens": 20}
        expected = generate(api, **body).json()["text"]
        gate = threading.Event()
        forward = engine.engine.runner.forward
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine.engine.runner, "forward", lambda step: (gate.wait(60), forward(step))[1])
            with pytest.MonkeyPatch.context() as away:
                away.setattr(other.engine, "draining", True)  # all goes to the first one
                until(lambda: f"{up}0.0" in api.http.get("/metrics").text)
                held = [pool.submit(http.post, "/generate", json=body) for _ in range(3)]
                scheduler = engine.engine.scheduler
                until(lambda: len(scheduler.running) + len(scheduler.waiting) + len(engine.engine._new) == 3)
            until(lambda: f"{up}1.0" in api.http.get("/metrics").text)
            sleeping = pool.submit(lie_down, engine)
            until(lambda: status(engine) == "asleep")
            assert generate(api).status_code == 200
            for answer in held:
                assert answer.result(30).json()["text"] == expected
            gate.set()
            assert sleeping.result().json() == {"asleep": True}
        for _ in range(4):
            assert generate(api).status_code == 200
