"""The engine over a socket: streams, limits, errors, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.conftest import free_port
from tests.serving import KINDS, EngineServer, engine_settings, make_adapter, serve_engine, until


@pytest.fixture(scope="module")
def adapters(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {k: make_adapter(tiny_base, folder / k, seed=i, **KINDS[k]) for i, k in enumerate(("small", "full"))}


@pytest.fixture(scope="module")
def engine(tiny_base: Path, adapters: dict[str, Path]) -> Iterator[EngineServer]:
    with serve_engine(engine_settings(tiny_base, engine_max_batch=4, engine_max_queue=4)) as served:
        for name, folder in adapters.items():
            served.load(name, folder)
        yield served


def events(engine: EngineServer, path: str = "/v1/completions", **body: Any) -> list[dict[str, Any]]:
    """The bodies of a stream, which is checked to be well-formed."""
    found = []
    with engine.http.stream("POST", path, json={"model": engine.base, "temperature": 0, "stream": True, **body}) as r:
        assert r.status_code == 200
        assert r.headers["content-type"].startswith("text/event-stream")
        text = b"".join(r.iter_raw()).decode()
    blocks = text.split("\n\n")
    assert blocks.pop() == ""
    assert blocks.pop() == "data: [DONE]"
    for block in blocks:
        assert block.startswith("data: ")
        assert "\n" not in block
        found.append(json.loads(block[6:]))
    return found


def joined(found: list[dict[str, Any]], index: int = 0) -> str:
    return "".join(c["text"] for e in found for c in e["choices"] if c["index"] == index)


@pytest.mark.parametrize("model", [None, "small", "full"])
@pytest.mark.parametrize("params", [{}, {"temperature": 1.0, "seed": 3}, {"stop": ["e", "\n"]}, {"logprobs": 2}])
def test_a_stream_says_what_the_whole_answer_says(
    engine: EngineServer, model: str | None, params: dict[str, Any]
) -> None:
    body = {"model": model or engine.base, "prompt": "def main(", "max_tokens": 40, "return_token_ids": True, **params}
    whole = engine.complete(**body)
    found = events(engine, **body, stream_options={"include_usage": True})
    (choice,) = whole["choices"]
    assert joined(found) == choice["text"]
    pieces = [e["choices"][0] for e in found if e["choices"]]
    assert [i for p in pieces for i in p["token_ids"]] == choice["token_ids"]
    assert [p["finish_reason"] for p in pieces] == [None] * (len(pieces) - 1) + [choice["finish_reason"]]
    assert found[-1]["choices"] == []
    assert found[-1]["usage"] == whole["usage"]
    if "logprobs" in params:
        for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            streamed = [x for p in pieces for x in p["logprobs"][key]]
            assert len(streamed) == len(choice["token_ids"])
            for a, b in zip(streamed, choice["logprobs"][key], strict=True):
                assert a == pytest.approx(b)


def test_timings_and_usage_are_told(engine: EngineServer) -> None:
    answer = engine.complete(prompt="import os", max_tokens=7, ignore_eos=True)
    usage = answer["usage"]
    assert usage["completion_tokens"] == 7
    assert usage["total_tokens"] == usage["prompt_tokens"] + 7
    timings = answer["lorry"]
    assert 0 <= timings["queue_ms"] <= timings["first_token_ms"] <= timings["total_ms"]


def test_a_stop_string_is_found_across_tokens_and_is_no_part_of_the_text(engine: EngineServer) -> None:
    body = {"model": "small", "prompt": "class A:", "max_tokens": 60, "ignore_eos": True}
    whole = engine.complete(**body, return_token_ids=True, logprobs=0)["choices"][0]
    text, starts = whole["text"], whole["logprobs"]["text_offset"]
    # Ends of one token's text and the beginning of the next one's, well inside the text.
    border = next(s for s in starts[10:] if text[s - 1 : s + 1].strip() and text.find(text[s - 2 : s + 2]) == s - 2)
    stop = text[border - 2 : border + 2]
    cut = engine.complete(**body, stop=["never", stop])["choices"][0]
    assert cut["text"] == text[: border - 2]
    assert (cut["finish_reason"], cut["stop_reason"]) == ("stop", stop)
    assert joined(events(engine, **body, stop=[stop])) == text[: border - 2]
    kept = engine.complete(**body, stop=[stop], include_stop_str_in_output=True)["choices"][0]
    assert kept["text"] == text[: border + 2]


def test_a_stop_string_that_is_a_special_token_ends_the_text(engine: EngineServer) -> None:
    body = {"prompt": "x", "max_tokens": 200, "temperature": 3.0, "seed": 1, "return_token_ids": True}
    tokenizer = engine.engine.runner.tokenizer
    eot = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    for seed in range(200):  # until the random model says it
        choice = engine.complete(**(body | {"seed": seed}), stop=["<|eot_id|>"])["choices"][0]
        if choice["finish_reason"] == "stop" and choice["token_ids"][-1] == eot:
            assert "<|eot_id|>" not in choice["text"]
            return
    pytest.fail("no text ended with <|eot_id|>")


def test_a_seed_repeats_under_load_and_n_takes_one_each(engine: EngineServer) -> None:
    body = {"model": "full", "prompt": "while True:", "max_tokens": 24, "temperature": 1.0, "return_token_ids": True}

    def ids(**more: Any) -> list[list[int]]:
        return [c["token_ids"] for c in engine.complete(**body, **more)["choices"]]

    (alone,) = ids(seed=11)
    with ThreadPoolExecutor(4) as pool:
        noise = [pool.submit(engine.complete, prompt=f"noise {i}", max_tokens=30, temperature=1.0) for i in range(3)]
        under_load = pool.submit(ids, seed=11).result()
        [n.result() for n in noise]
    assert under_load == [alone]
    three = ids(seed=11, n=3)
    assert three[0] == alone
    assert three[1:] == [*ids(seed=12), *ids(seed=13)]
    assert len({tuple(t) for t in three}) == 3
    assert ids() != ids()  # without a seed nothing repeats


def test_several_prompts_and_token_ids_are_answered_in_order(engine: EngineServer) -> None:
    texts = ["import sys", "def f(x):"]
    tokenizer = engine.engine.runner.tokenizer
    one_by_one = [engine.complete(prompt=t, max_tokens=8)["choices"][0]["text"] for t in texts]
    together = engine.complete(prompt=texts, max_tokens=8)["choices"]
    assert [c["text"] for c in together] == one_by_one
    ids = engine.complete(prompt=[tokenizer(t)["input_ids"] for t in texts], max_tokens=8)["choices"]
    assert [c["text"] for c in ids] == one_by_one
    found = events(engine, prompt=texts, max_tokens=8)
    assert [joined(found, i) for i in (0, 1)] == one_by_one


def test_bos_is_added_once_or_not_at_all(engine: EngineServer) -> None:
    with_bos = engine.complete(prompt="a", max_tokens=1)["usage"]["prompt_tokens"]
    without = engine.complete(prompt="a", max_tokens=1, add_special_tokens=False)["usage"]["prompt_tokens"]
    written = engine.complete(prompt="<|bos|>a", max_tokens=1, add_special_tokens=False)["usage"]["prompt_tokens"]
    assert (with_bos, without, written) == (2, 1, 2)


# Limits


def hold(engine: EngineServer, count: int, **body: Any) -> list[httpx.Response]:
    """Streams that run for long: the first event of each has been read."""
    streams = []
    for _ in range(count):
        request = engine.http.build_request(
            "POST",
            "/v1/completions",
            json={"model": engine.base, "prompt": "x", "max_tokens": 240, "ignore_eos": True, "stream": True, **body},
        )
        response = engine.http.send(request, stream=True)
        streams.append(response)
    return streams


def slow_down(engine: EngineServer, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.1) -> None:
    """Steps of a known length, as those of a larger model."""
    forward = engine.engine.runner.forward
    monkeypatch.setattr(engine.engine.runner, "forward", lambda step: (time.sleep(seconds), forward(step))[1])


def test_a_client_that_leaves_frees_its_place_within_two_steps(
    engine: EngineServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_down(engine, monkeypatch, 0.1)
    left, stays = hold(engine, 2)
    until(lambda: len(engine.engine.scheduler.running) == 2)
    steps = engine.engine.steps
    left.close()
    until(lambda: len(engine.engine.scheduler.running) == 1)
    assert engine.engine.steps - steps <= 2
    stays.close()
    until(engine.idle)


def test_a_client_that_leaves_while_it_waits_leaves_the_queue(
    engine: EngineServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_down(engine, monkeypatch)
    running = hold(engine, 4)
    until(lambda: len(engine.engine.scheduler.running) == 4)
    (waiting,) = hold(engine, 1)
    with socket.create_connection(("127.0.0.1", int(engine.url.rsplit(":", 1)[1]))) as raw:  # not streaming
        body = json.dumps({"model": engine.base, "prompt": "y", "max_tokens": 200}).encode()
        head = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        raw.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}".encode() + body)
        until(lambda: len(engine.engine.scheduler.waiting) == 2)
    until(lambda: len(engine.engine.scheduler.waiting) == 1)
    waiting.close()
    until(lambda: len(engine.engine.scheduler.waiting) == 0)
    assert len(engine.engine.scheduler.running) == 4
    for r in running:
        r.close()
    until(engine.idle)


def test_a_full_queue_is_503_with_retry_after_and_takes_requests_again(
    engine: EngineServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_down(engine, monkeypatch)
    streams = hold(engine, 8)
    assert all(s.status_code == 200 for s in streams)
    refused = engine.http.post("/v1/completions", json={"model": engine.base, "prompt": "x"})
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "queue_full"
    assert int(refused.headers["retry-after"]) >= 1
    for s in streams:
        s.close()
    until(engine.idle)
    assert engine.complete(prompt="x", max_tokens=2)["choices"][0]["finish_reason"]


def test_more_choices_than_there_are_places_can_never_be_served(engine: EngineServer) -> None:
    refused = engine.http.post("/v1/completions", json={"model": engine.base, "prompt": "x", "n": 9})
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "n")
    assert engine.idle()
    assert len(engine.complete(prompt="x", n=8, max_tokens=2)["choices"]) == 8


def test_a_prompt_too_long_is_422_with_both_lengths_and_the_longest_fits(engine: EngineServer) -> None:
    refused = engine.http.post("/v1/completions", json={"model": engine.base, "prompt": [10] * 256})
    assert refused.status_code == 422
    error = refused.json()["error"]
    assert (error["code"], error["param"], error["prompt_tokens"], error["max_tokens"]) == (
        "prompt_too_long",
        "prompt",
        256,
        256,
    )
    longest = engine.complete(prompt=[10] * 255, max_tokens=50, ignore_eos=True)
    assert longest["usage"]["completion_tokens"] == 1
    assert longest["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"model": "nobody"}, 404, "model"),
        ({"temperature": -1}, 422, "temperature"),
        ({"top_p": 0}, 422, "top_p"),
        ({"logprobs": 21}, 422, "logprobs"),
        ({"n": 0}, 422, "n"),
        ({"stop": [""]}, 422, None),
        ({"unknown": 1}, 422, "unknown"),
        ({"echo": True}, 422, "echo"),
        ({"stream_options": {"include_usage": True}}, 422, "stream_options"),
        ({"prompt": ""}, 422, "prompt"),
        ({"prompt": []}, 422, "prompt"),
        ({"prompt": [5, 5000]}, 422, "prompt"),
        ({"prompt": [-1]}, 422, "prompt"),
        ({"prompt": {"a": 1}}, 422, None),
        ({"max_tokens": 0}, 422, "max_tokens"),
        ({"temperature": float("nan")}, 422, "temperature"),
    ],
)
def test_bad_input_has_an_answer(engine: EngineServer, body: dict[str, Any], status: int, param: str | None) -> None:
    content = json.dumps({"model": engine.base, "prompt": "x", **body})
    response = engine.http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert response.status_code == status
    error = response.json()["error"]
    assert error["message"]
    if param:
        assert error["param"] == param
    if status == 404:
        assert error["code"] == "model_not_found"
    assert engine.idle()


# Adapters


def test_adapters_are_loaded_listed_and_unloaded(engine: EngineServer, adapters: dict[str, Path]) -> None:
    engine.load("again", adapters["small"])
    cards = engine.http.get("/v1/models").json()["data"]
    assert cards[0]["id"] == engine.base
    assert cards[0]["max_model_len"] == 256
    assert cards[0]["lorry"]["template"]["kind"] == "chat"
    assert {c["id"] for c in cards[1:]} == {"small", "full", "again"}
    assert all(c["parent"] == engine.base for c in cards[1:])
    assert engine.http.post("/v1/unload_lora_adapter", json={"lora_name": "again"}).status_code == 200
    gone = engine.http.post("/v1/completions", json={"model": "again", "prompt": "x"})
    assert gone.status_code == 404
    assert engine.http.post("/v1/unload_lora_adapter", json={"lora_name": "again"}).status_code == 404


def test_an_adapter_of_another_base_is_409(engine: EngineServer, adapters: dict[str, Path], tmp_path: Path) -> None:
    config = json.loads((adapters["small"] / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/other"}))
    (tmp_path / "adapter_model.safetensors").write_bytes((adapters["small"] / "adapter_model.safetensors").read_bytes())
    refused = engine.http.post("/v1/load_lora_adapter", json={"lora_name": "o", "lora_path": str(tmp_path)})
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "wrong_base")
    assert "trained on org/other" in refused.json()["error"]["message"]


def test_metrics_count(engine: EngineServer) -> None:
    def value(name: str) -> float:
        lines = engine.http.get("/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))

    before = value('lorry_engine_completion_tokens_total{adapter="small"}')
    engine.complete(model="small", prompt="x", max_tokens=9, ignore_eos=True)
    assert value('lorry_engine_completion_tokens_total{adapter="small"}') == before + 9
    assert value("lorry_engine_adapters_loaded") == 2
    assert value("lorry_engine_first_token_seconds_count") > 0
    assert value('lorry_engine_adapter_first_token_seconds_count{adapter="small"}') > 0
    assert value("lorry_engine_queue_seconds_count") > 0
    assert value("lorry_engine_batch_size_count") > 0
    assert value("lorry_engine_running") == value("lorry_engine_waiting") == 0


# The official SDK


def test_the_openai_sdk_runs_against_the_engine(engine: EngineServer) -> None:
    client = openai.OpenAI(base_url=f"{engine.url}/v1", api_key="none", max_retries=0)
    assert client.models.list().data[0].id == engine.base
    messages: Any = [{"role": "user", "content": "Hello"}]
    chat = client.chat.completions.create(
        model="full", messages=messages, max_completion_tokens=8, seed=1, n=2, logprobs=True, top_logprobs=2
    )
    assert [c.index for c in chat.choices] == [0, 1]
    assert chat.usage is not None
    logprobs = chat.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content[0].top_logprobs) == 2
    stream = client.chat.completions.create(
        model="full",
        messages=messages,
        max_completion_tokens=8,
        seed=1,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == chat.choices[0].message.content
    assert chunks[-1].usage is not None
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="nobody", messages=messages)


# The process


def process(tiny_base: Path, port: int, *, fail_after: int | None = None) -> subprocess.Popen[str]:
    """An engine in a process of its own; with `fail_after`, its model breaks at that step."""
    code = f"""
import sys, time
from service.settings import Settings
from worker.engine import server
settings = Settings()
engine = server.build_engine(settings)
forward, fail_after = engine.runner.forward, {fail_after!r}
def broken(step):
    time.sleep(0.02)
    if fail_after is not None and engine.steps >= fail_after:
        raise RuntimeError("the device is gone")
    return forward(step)
engine.runner.forward = broken
sys.exit(server.run(engine, settings))
"""
    env = {
        **os.environ,
        "LORRY_BASE_MODEL": str(tiny_base),
        "LORRY_ENGINE_PORT": str(port),
        "LORRY_ENGINE_MAX_SEQ_LENGTH": "500",
        "LORRY_TORCH_THREADS": "1",
        "LORRY_SHUTDOWN_SECONDS": "1",
    }
    started = subprocess.Popen([sys.executable, "-c", code], env=env, stderr=subprocess.PIPE, text=True)

    def up() -> bool:
        assert started.poll() is None, started.stderr.read() if started.stderr else ""
        try:
            return httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
        except httpx.HTTPError:
            return False

    until(up, 180)  # importing torch takes most of a minute on a machine that is busy enough
    return started


def collect(port: int, base: Path, into: list[str], **body: Any) -> threading.Thread:
    """Read a stream to its end in a thread."""

    def read() -> None:
        json_body = {"model": str(base), "prompt": "x", "max_tokens": 400, "ignore_eos": True, "stream": True, **body}
        with httpx.stream("POST", f"http://127.0.0.1:{port}/v1/completions", json=json_body, timeout=60) as r:
            into.extend(r.iter_lines())

    thread = threading.Thread(target=read)
    thread.start()
    return thread


def errors(lines: list[str]) -> list[dict[str, Any]]:
    bodies = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    return [b["error"] for b in bodies if "error" in b]


def test_a_fatal_error_reaches_every_client_and_the_process_exits_for_its_supervisor(tiny_base: Path) -> None:
    port = free_port()
    engine = process(tiny_base, port, fail_after=20)
    lines: list[list[str]] = [[], [], []]
    threads = [collect(port, tiny_base, into) for into in lines]
    for thread in threads:
        thread.join(30)
    assert engine.wait(20) == 1
    for got in lines:
        assert len([x for x in got if '"text"' in x]) > 3  # it had begun
        (error,) = errors(got)
        assert error["code"] == "engine_failed"
        assert "the device is gone" in error["message"]


def test_at_sigterm_open_streams_get_their_grace_then_an_error_and_the_exit_is_clean(tiny_base: Path) -> None:
    port = free_port()
    engine = process(tiny_base, port)
    short: list[str] = []
    long: list[str] = []
    threads = [collect(port, tiny_base, short, max_tokens=30), collect(port, tiny_base, long)]
    until(lambda: short and long)
    engine.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    with pytest.raises(httpx.HTTPError):
        httpx.post(f"http://127.0.0.1:{port}/v1/completions", json={"model": str(tiny_base), "prompt": "x"})
    for thread in threads:
        thread.join(20)
    assert engine.wait(20) == 0
    assert errors(short) == []
    assert short[-2:] == ["data: [DONE]", ""] or short[-1] == "data: [DONE]"
    (error,) = errors(long)
    assert "shutting down" in error["message"]
