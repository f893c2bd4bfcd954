"""Several engines behind one API: who answers, and what is left when one dies."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from service import engine_watch
from service.settings import Settings
from tests.conftest import Api, free_port, serve
from tests.door import Door, door
from tests.serving import KINDS, EngineServer, engine_settings, make_adapter, register, serve_engine, until
from tests.test_generate_vllm import vllm

LONG = {"prompt": "x", "max_new_tokens": 200, "temperature": 0}


@dataclass
class Farm:
    """Engines a and b of one base, each behind a door, and c of another base; one API over all of them."""

    api: Api
    a: EngineServer
    b: EngineServer
    c: EngineServer
    doors: dict[int, Door]  # by the engine's id()
    folders: dict[str, Path]

    def door(self, engine: EngineServer) -> Door:
        return self.doors[id(engine)]

    def generate(self, status: int = 200, **body: Any) -> dict[str, Any]:
        answer = self.api.http.post("/generate", json={"prompt": "import os", "max_new_tokens": 8, **body})
        assert answer.status_code == status, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def holding(self, name: str) -> list[EngineServer]:
        return [e for e in (self.a, self.b, self.c) if name in held(e)]

    def gauge(self, name: str, engine: EngineServer) -> float | None:
        """A gauge of the API, labelled with the engine."""
        at = self.doors[id(engine)].name if id(engine) in self.doors else engine.url.removeprefix("http://")
        wanted = f'{name}{{engine="{at}"}} '
        lines = self.api.http.get("/metrics").text.splitlines()
        return next((float(line.removeprefix(wanted)) for line in lines if line.startswith(wanted)), None)


def held(engine: EngineServer) -> set[str]:
    return {adapter.name for adapter in engine.engine.adapters.held()}


def text_of(engine: EngineServer, model: str | None = None) -> str:
    """What the engine itself answers to Farm.generate's prompt."""
    asked = {"model": model or engine.base, "prompt": "<|bos|>import os", "add_special_tokens": False, "max_tokens": 8}
    text: str = engine.complete(**asked)["choices"][0]["text"]
    return text


@contextmanager
def stopped(*engines: EngineServer, after: int = 0) -> Iterator[None]:
    """The engines take no step, or only so many more, until the block ends."""
    gate = threading.Event()
    with pytest.MonkeyPatch.context() as patch:
        for engine in engines:
            forward, left = engine.engine.runner.forward, iter(range(after))

            def step(scheduled: Any, forward: Any = forward, left: Iterator[int] = left) -> Any:
                if next(left, None) is None:
                    gate.wait(120)
                return forward(scheduled)

            patch.setattr(engine.engine.runner, "forward", step)
        try:
            yield
        finally:
            gate.set()


def running(engine: EngineServer) -> int:
    """Requests under way, those that wait for its thread too."""
    scheduler = engine.engine.scheduler
    return len(scheduler.running) + len(scheduler.waiting) + len(engine.engine._new)


class Streams:
    """Requests that stay open, each with an event stream."""

    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=url, timeout=120)
        self.open: list[httpx.Response] = []

    def __enter__(self) -> Streams:
        return self

    def __exit__(self, *exc: object) -> None:
        for response in self.open:
            response.close()
        self._http.close()

    def begin(self, **body: Any) -> Iterator[str]:
        """The lines of one."""
        request = self._http.build_request("POST", "/generate", json={**LONG, "stream": True, **body})
        response = self._http.send(request, stream=True)
        assert response.status_code == 200, response.read()
        self.open.append(response)
        return response.iter_lines()


def last_error(lines: Iterator[str]) -> str:
    """The code of the error event that ends a stream."""
    *_, event, data = (line for line in lines if line and not line.startswith(":"))
    assert event == "event: error", (event, data)
    code: str = json.loads(data.removeprefix("data: "))["error"]["code"]
    return code


@pytest.fixture(scope="module")
def folders(tiny_base: Path, tiny_base_tied: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    bases = {"one": tiny_base, "two": tiny_base, "three": tiny_base, "other": tiny_base_tied}
    return {n: make_adapter(base, root / n, seed=i, **KINDS["small"]) for i, (n, base) in enumerate(bases.items())}


@pytest.fixture(scope="module")
def farm(
    tiny_base: Path,
    tiny_base_tied: Path,
    folders: dict[str, Path],
    sqlite_url: str,
    make_settings: Callable[..., Settings],
) -> Iterator[Farm]:
    with ExitStack() as stack:
        small = {"engine_max_batch": 2, "engine_max_queue": 2}
        a, b = (stack.enter_context(serve_engine(engine_settings(tiny_base, **small))) for _ in range(2))
        c = stack.enter_context(serve_engine(engine_settings(tiny_base_tied)))
        doors = {id(engine): stack.enter_context(door(engine.url)) for engine in (a, b)}
        urls = ", ".join([*(d.url for d in doors.values()), c.url])
        settings = make_settings(database_url=sqlite_url, engine_url=urls, base_model=str(tiny_base))
        api = stack.enter_context(serve(settings))
        for name, folder in folders.items():
            # As trained elsewhere, on a quantised copy from a hub: only the base's own name counts.
            base = f"some-org/{tiny_base_tied.name if name == 'other' else tiny_base.name}-unsloth-bnb-4bit"
            register(api.db, name, folder, base)
        yield Farm(api, a, b, c, doors, folders)


@pytest.fixture
def all_up(farm: Farm) -> Iterator[Farm]:
    """The farm with all doors open, idle, and no adapter loaded, before and after the test."""

    def clean() -> None:
        for one in farm.doors.values():
            one.open()
        engines = (farm.a, farm.b, farm.c)
        until(lambda: all(farm.gauge("lorry_engine_up", e) == 1 for e in engines))
        until(lambda: all(e.idle() for e in engines))
        until(lambda: all(farm.gauge("lorry_engine_open_requests", e) == 0 for e in engines))
        for name in farm.folders:
            assert farm.api.http.post(f"/v1/adapters/{name}/unload").status_code == 200

    clean()
    yield farm
    clean()


def test_a_request_goes_to_an_engine_that_holds_its_base(all_up: Farm) -> None:
    farm = all_up
    other = farm.generate(adapter="other")["text"]
    assert farm.holding("other") == [farm.c]
    assert other == text_of(farm.c, "other") != text_of(farm.c)
    assert farm.generate()["text"] == text_of(farm.a) == text_of(farm.b) != text_of(farm.c), "LORRY_BASE_MODEL"
    client = openai.OpenAI(base_url=f"{farm.api.url}/v1", api_key="none", max_retries=0)
    models = [m.id for m in client.models.list().data]
    assert models == [farm.a.base, farm.c.base, "one", "other", "three", "two"], "each base once, then the adapters"
    for engine in (farm.a, farm.c):
        answer = client.completions.create(model=engine.base, prompt="import os", max_tokens=8, temperature=0)
        assert answer.choices[0].text == text_of(engine)
    chunks = client.chat.completions.create(
        model="other", messages=[{"role": "user", "content": "x"}], max_tokens=4, stream=True
    )
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] in ("stop", "length")
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="nobody", prompt="x")


def test_an_adapter_stays_where_it_is_and_others_go_where_there_are_fewer(
    all_up: Farm, make_settings: Callable[..., Settings]
) -> None:
    farm = all_up
    first = farm.generate(adapter="one")["text"]
    (home,) = farm.holding("one")
    for _ in range(3):
        assert farm.generate(adapter="one")["text"] == first
    assert farm.holding("one") == [home]
    farm.generate(adapter="two")
    assert farm.holding("two") == [farm.b if home is farm.a else farm.a]
    home.engine.adapters.unload("one")  # an engine that was started again has forgotten it
    assert farm.generate(adapter="one")["text"] == first
    # Another API process, which has loaded nothing itself, finds it where it is; so does the list of adapters.
    urls = ",".join(reversed([d.url for d in farm.doors.values()]))
    same = {"database_url": farm.api.settings.database_url, "base_model": farm.api.settings.base_model}
    with serve(make_settings(**same, engine_url=urls)) as second:
        for name in ("one", "two"):
            at = farm.holding(name)
            body = {"adapter": name, "prompt": "import os", "max_new_tokens": 8}
            assert second.http.post("/generate", json=body).status_code == 200
            assert farm.holding(name) == at
        loaded = {a["name"]: a["loaded"] for a in second.http.get("/v1/adapters").json()["data"]}
        assert loaded == {"one": True, "two": True, "three": False, "other": False}


def test_load_takes_one_engine_and_unload_all(all_up: Farm) -> None:
    farm = all_up
    assert farm.api.http.post("/v1/adapters/one/load").json() == {"name": "one", "loaded": True}
    assert len(farm.holding("one")) == 1
    for engine in (farm.a, farm.b):  # as another API process may have done
        engine.load("one", farm.folders["one"])
        engine.load("temporary", farm.folders["two"])
    assert farm.api.http.post("/v1/adapters/one/unload").json() == {"name": "one", "loaded": False}
    assert farm.holding("one") == []
    register(farm.api.db, "temporary", farm.folders["two"], farm.a.base)
    farm.api.http.patch("/v1/adapters/temporary", json={"name": "renamed"})
    assert farm.holding("temporary") == []
    with farm.api.db.write() as session:
        from service.models import AdapterRow

        session.delete(session.get(AdapterRow, "renamed"))


def test_open_requests_spread_and_a_full_engine_s_go_to_another_until_all_are_full(all_up: Farm) -> None:
    farm = all_up
    with stopped(farm.a, farm.b), Streams(farm.api.url) as streams:
        for n in range(4):
            streams.begin()
            until(lambda n=n: running(farm.a) + running(farm.b) == n + 1)  # type: ignore[misc]
            assert abs(running(farm.a) - running(farm.b)) <= 1
        assert [farm.gauge("lorry_engine_open_requests", e) for e in (farm.a, farm.b, farm.c)] == [2, 2, 0]
    until(lambda: farm.a.idle() and farm.b.idle())
    farm.generate(adapter="one")
    (home,) = farm.holding("one")
    away = farm.b if home is farm.a else farm.a
    with stopped(home, away), Streams(farm.api.url) as streams:
        for _ in range(4):  # two run, two wait
            streams.begin(adapter="one")
        assert (running(home), running(away)) == (4, 0), "it is resident there"
        for _ in range(4):
            streams.begin(adapter="one")
        assert (running(home), running(away)) == (4, 4)
        assert len(farm.holding("one")) == 2
        answer = farm.api.http.post("/generate", json={"adapter": "one", "prompt": "x"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "queue_full")
        assert int(answer.headers["retry-after"]) >= 1
        assert farm.generate(adapter="other")["text"], "other bases are not held up"


@pytest.fixture
def quick_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_watch, "PROBE", 3.0)
    monkeypatch.setattr(engine_watch, "WATCH", 0.5)
    monkeypatch.setattr(engine_watch, "SILENT", 2)


@pytest.mark.parametrize("death", ["shut", "hold"])
def test_when_an_engine_dies_streams_that_had_begun_end_and_everything_else_is_answered_by_another(
    all_up: Farm, death: str, quick_watch: None
) -> None:
    farm = all_up
    expected = farm.generate(adapter="one", max_new_tokens=40)["text"]
    (home,) = farm.holding("one")
    with stopped(home, after=6), Streams(farm.api.url) as streams, ThreadPoolExecutor(2) as pool:
        begun = streams.begin(adapter="one")
        assert next(begun) == "event: token"
        body = {"adapter": "one", "prompt": "import os", "max_new_tokens": 40}
        whole: Future[httpx.Response] = pool.submit(farm.api.http.post, "/generate", json=body, timeout=120)
        until(lambda: running(home) == 2)
        waiting = streams.begin(adapter="one", prompt="import os", max_new_tokens=40)  # in the queue: no token yet
        until(lambda: running(home) == 3)
        getattr(farm.door(home), death)()
        assert last_error(begun) == "engine_unavailable"
        assert whole.result(120).json()["text"] == expected
        done = json.loads([line for line in waiting if line.startswith("data: ")][-1].removeprefix("data: "))
        assert done["text"] == expected
        assert len(farm.holding("one")) == 2, "the other engine has loaded it"
        until(lambda: farm.gauge("lorry_engine_up", home) == 0)
        assert [farm.generate(adapter=name)["adapter"] for name in ("one", "two", "three")] == ["one", "two", "three"]
        if death == "shut":
            ready = farm.api.http.get("/readyz", params={"parts": "engine"})
            detail = ready.json()["parts"]["engine"]["detail"]
            assert ready.status_code == 200
            assert detail.startswith("2 of 3 ready: ")
            assert f"{farm.door(home).name}: no answer" in detail
        listed = farm.api.http.get("/v1/models").json()["data"]
        assert [m["id"] for m in listed][:2] == [farm.a.base, farm.c.base]
    farm.door(home).open()
    until(lambda: farm.gauge("lorry_engine_up", home) == 1)
    away = farm.b if home is farm.a else farm.a
    with stopped(home, away), Streams(farm.api.url) as streams:
        for _ in range(2):
            streams.begin()
        until(lambda: running(home) == 1 and running(away) == 1)  # it is used again


def test_an_engine_that_is_about_to_end_gets_no_more_requests(all_up: Farm, quick_watch: None) -> None:
    farm = all_up
    farm.generate(adapter="one")
    (home,) = farm.holding("one")
    home.engine.draining = True  # as after SIGTERM: open requests may end, new ones are told to go
    try:
        assert farm.generate(adapter="one")["text"]
        assert len(farm.holding("one")) == 2
        assert farm.gauge("lorry_engine_up", home) == 0
        assert farm.generate(adapter="one")["text"]
    finally:
        home.engine.draining = False
    until(lambda: farm.gauge("lorry_engine_up", home) == 1)


def test_without_an_engine_of_the_base_it_is_409_or_503_if_one_is_away(
    all_up: Farm, make_settings: Callable[..., Settings], tiny_base: Path
) -> None:
    farm = all_up
    register(farm.api.db, "lost", farm.folders["one"], "some-org/nowhere")
    error = farm.generate(409, adapter="lost")["error"]
    assert error["code"] == "wrong_base"
    for name in ("lost", "some-org/nowhere", farm.a.base, farm.c.base):
        assert name in error["message"]
    for one in farm.doors.values():
        one.shut()
    for body in ({"adapter": "one"}, {}, {"adapter": "one", "stream": True}):
        assert farm.generate(503, **body)["error"]["code"] == "engine_unavailable"
    assert farm.generate(adapter="other")["text"]
    # Of one that has never answered nothing is known: it may be the one.
    nobody = f"http://127.0.0.1:{free_port()}"
    same = {"database_url": farm.api.settings.database_url, "base_model": str(tiny_base)}
    with serve(make_settings(**same, engine_url=f"{nobody},{farm.c.url}")) as api:
        answers = {
            name: api.http.post("/generate", json={"adapter": name, "prompt": "x"}) for name in ("one", "other", "lost")
        }
        assert {name: answer.status_code for name, answer in answers.items()} == {"one": 503, "other": 200, "lost": 503}
        assert nobody.removeprefix("http://") in answers["one"].json()["error"]["message"]
        assert api.http.post("/generate", json={"prompt": "x"}).status_code == 200, "the first base that answers"
        chat = {"model": "nobody", "messages": [{"role": "user", "content": "x"}]}
        assert api.http.post("/v1/chat/completions", json=chat).status_code == 503


def test_a_vllm_server_may_be_among_them(all_up: Farm, tmp_path: Path, make_settings: Callable[..., Settings]) -> None:
    farm = all_up
    server = uvicorn.Server(uvicorn.Config(vllm(farm.a), host="127.0.0.1", port=0, log_config=None))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    same = {"database_url": farm.api.settings.database_url, "base_model": farm.api.settings.base_model}
    expected = farm.generate(adapter="one")["text"]
    chat = farm.generate(prompt=None, messages=[{"role": "user", "content": "x"}])["text"]
    farm.api.http.post("/v1/adapters/one/unload")
    with serve(make_settings(**same, engine_url=f"{url},{farm.door(farm.b).url},{farm.c.url}")) as api:
        with stopped(farm.b), Streams(api.url) as streams:
            streams.begin()
            streams.begin()  # one each: what follows goes to the vLLM server first
            until(lambda: running(farm.b) == 1)
            own = shutil.copytree(farm.folders["two"], tmp_path / "own")
            register(api.db, "own", own, farm.b.base, config={"train_embeddings": True})
            assert api.http.post("/v1/adapters/own/load").status_code == 200
            assert farm.holding("own") == [farm.b]
            one = api.http.post("/generate", json={"adapter": "one", "prompt": "import os", "max_new_tokens": 8})
            assert one.json()["text"] == expected
            assert farm.holding("one") == [farm.a]
        # A conversation for the base is rendered with the template that lorry's engine tells, wherever it goes.
        body = {"messages": [{"role": "user", "content": "x"}], "max_new_tokens": 8}
        assert api.http.post("/generate", json=body).json()["text"] == chat
        assert api.http.delete("/v1/adapters/own").status_code == 200
    server.should_exit = True
    thread.join(10)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("http://a:1,http://a:1/", "named twice"),
        ("a:8322", "no engine's URL"),
        ("http://a:1,ftp://b:1", "no engine's URL"),
        (" , ", "names no engine"),
    ],
)
def test_a_list_that_cannot_be_meant_is_refused(value: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Settings(engine_url=value)


def test_a_list_is_read_with_or_without_blanks() -> None:
    assert Settings(engine_url="http://a:1, https://b/x/,").engine_urls == ["http://a:1", "https://b/x"]
