"""POST /generate, through the API, the registry and a real engine, over sockets."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.settings import Settings
from service.templates import StoredTemplate
from tests.conftest import Api, serve
from tests.serving import KINDS, EngineServer, engine_settings, make_adapter, register, serve_engine, until

PROMPT = "Topic: {topic}\nLanguage: {language}\n\n{text}"


@dataclass
class Stack:
    api: Api
    engine: EngineServer
    job: str

    def generate(self, **body: Any) -> dict[str, Any]:
        response = self.api.http.post("/generate", json={"max_new_tokens": 12, **body})
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def stream(self, **body: Any) -> list[tuple[str, dict[str, Any]]]:
        """(event, data) pairs; comments are skipped."""
        with self.api.http.stream("POST", "/generate", json={"max_new_tokens": 12, "stream": True, **body}) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"].startswith("text/event-stream")
            text = b"".join(response.iter_raw()).decode()
        found = []
        for block in text.split("\n\n"):
            lines = [line for line in block.split("\n") if line and not line.startswith(":")]
            if lines:
                event, data = lines
                found.append((event.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
        return found


@pytest.fixture(scope="module")
def folders(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    made = {k: make_adapter(tiny_base, root / k, seed=i, **KINDS[k]) for i, k in enumerate(("small", "full"))}
    made["step"] = make_adapter(tiny_base, root / "step", seed=9, **KINDS["small"])
    made["prompted"] = make_adapter(tiny_base, root / "prompted", seed=8, **KINDS["small"])
    own = StoredTemplate(
        kind="prompt",
        prompt=PROMPT,
        bos="<|bos|>",
        eos="<|eos|>",
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        stop=["<|eos|>"],
    )
    (made["prompted"] / "lorry_template.json").write_text(own.model_dump_json())
    return made


@pytest.fixture(scope="module")
def stack(
    tiny_base: Path, folders: dict[str, Path], sqlite_url: str, make_settings: Callable[..., Settings]
) -> Iterator[Stack]:
    with serve_engine(
        engine_settings(tiny_base, engine_max_batch=4, engine_max_queue=4, engine_max_adapters=3)
    ) as engine:
        settings = make_settings(database_url=sqlite_url, engine_url=engine.url, base_model=str(tiny_base))
        with serve(settings) as api:
            job = register(api.db, "chatty", folders["full"], str(tiny_base), checkpoints={20: folders["step"]})
            register(api.db, "small", folders["small"], str(tiny_base))
            register(api.db, "prompted", folders["prompted"], str(tiny_base))
            yield Stack(api, engine, job)


def engine_text(stack: Stack, model: str, text: str, **body: Any) -> str:
    """What the engine makes of exactly this text."""
    asked = {"model": model, "prompt": text, "add_special_tokens": False, "max_tokens": 12, **body}
    answer: str = stack.engine.complete(**asked)["choices"][0]["text"]
    return answer


def test_the_base_goes_on_with_a_prompt(stack: Stack) -> None:
    answer = stack.generate(prompt="import os")
    assert set(answer) == {"id", "adapter", "text", "token_ids", "finish_reason", "usage", "timings", "logprobs"}
    assert answer["id"].startswith("gen_")
    assert answer["adapter"] is None
    assert answer["text"] == engine_text(stack, stack.engine.base, "<|bos|>import os")  # BOS once
    assert answer["finish_reason"] == "length"
    assert len(answer["token_ids"]) == answer["usage"]["completion_tokens"] == 12
    assert answer["logprobs"] is None
    timings = answer["timings"]
    assert 0 < timings["queue_ms"] <= timings["first_token_ms"] <= timings["total_ms"]


def test_an_adapter_is_loaded_when_it_is_asked_for(stack: Stack) -> None:
    if "small" in {a.name for a in stack.engine.engine.adapters.held()}:
        stack.engine.engine.adapters.unload("small")
    answer = stack.generate(adapter="small", prompt="import os")
    assert answer["adapter"] == "small"
    assert answer["text"] == engine_text(stack, "small", "<|bos|>import os")
    assert answer["text"] != stack.generate(prompt="import os")["text"]


def test_an_adapter_the_engine_forgot_is_loaded_again(stack: Stack) -> None:
    first = stack.generate(adapter="small", prompt="x")
    stack.engine.engine.adapters.unload("small")
    assert stack.generate(adapter="small", prompt="x")["text"] == first["text"]


def test_more_adapters_than_the_engine_holds_take_turns(stack: Stack) -> None:
    refs = ["small", "chatty", "chatty@20", "prompted"]
    first = {r: stack.generate(adapter=r, prompt="x")["text"] for r in refs}
    assert len(stack.engine.engine.adapters.held()) == 3
    assert {r: stack.generate(adapter=r, prompt="x")["text"] for r in refs} == first
    assert len(set(first.values())) == 4


def test_a_pinned_adapter_stays_in_the_engine(stack: Stack) -> None:
    engine = stack.engine.engine.adapters
    stack.generate(adapter="small", prompt="x")
    assert stack.api.http.patch("/v1/adapters/small", json={"pinned": True}).json()["pinned"]
    assert engine.pinned("small")
    for ref in ("chatty", "chatty@20", "prompted"):
        stack.generate(adapter=ref, prompt="x")
    assert "small" in {a.name for a in engine.held()}
    engine.unload("small")  # as an engine that was started again, which knows of no pin
    stack.generate(adapter="small", prompt="x")
    assert engine.pinned("small")
    assert not stack.api.http.patch("/v1/adapters/small", json={"pinned": False}).json()["pinned"]
    assert not engine.pinned("small")


def test_an_adapter_for_which_pinned_ones_leave_no_room_is_a_conflict(stack: Stack) -> None:
    pinned = ("small", "chatty", "prompted")
    for name in pinned:
        stack.generate(adapter=name, prompt="x")
        stack.api.http.patch(f"/v1/adapters/{name}", json={"pinned": True})
    refused = stack.api.http.post("/generate", json={"adapter": "chatty@20", "prompt": "x"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "no_room_for_adapter")
    for name in pinned:
        stack.api.http.patch(f"/v1/adapters/{name}", json={"pinned": False})
    assert stack.generate(adapter="chatty@20", prompt="x")["text"]


def test_a_name_that_stands_for_other_files_now_gives_their_text(stack: Stack, folders: dict[str, Path]) -> None:
    before = stack.generate(adapter="small", prompt="x")["text"]
    stack.engine.load("small", folders["step"])  # what an earlier adapter of that name may have left in the engine
    stack.api.app.state.engine.engines[0]._loaded.clear()  # as in an API that was started since
    assert stack.generate(adapter="small", prompt="x")["text"] == before


def test_a_checkpoint_is_served_under_its_step(stack: Stack) -> None:
    by_name = stack.generate(adapter="chatty@20", prompt="x")
    assert by_name["text"] != stack.generate(adapter="chatty", prompt="x")["text"]
    assert stack.generate(adapter=f"{stack.job}@20", prompt="x")["text"] == by_name["text"]
    assert by_name["adapter"] == "chatty@20"


def test_messages_are_rendered_with_the_stored_chat_template(stack: Stack) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    rendered = (
        "<|bos|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eos|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eos|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    for adapter, model in (("chatty", "chatty"), (None, stack.engine.base)):
        answer = stack.generate(adapter=adapter, messages=messages)
        assert answer["text"] == engine_text(stack, model, rendered)


def test_inputs_fill_the_stored_prompt_template_up_to_what_is_not_given(stack: Stack) -> None:
    answer = stack.generate(adapter="prompted", inputs={"topic": "tea", "language": "en"})
    assert answer["text"] == engine_text(stack, "prompted", "<|bos|>Topic: tea\nLanguage: en\n\n")


@pytest.mark.parametrize("adapter", [None, "chatty"])
@pytest.mark.parametrize("params", [{}, {"temperature": 1.0, "seed": 5, "top_k": 40, "top_p": 0.9}, {"logprobs": 2}])
def test_the_stream_says_what_the_whole_answer_says(stack: Stack, adapter: str | None, params: dict[str, Any]) -> None:
    body = {"adapter": adapter, "prompt": "def f(", "max_new_tokens": 40, **params}
    whole = stack.generate(**body)
    *tokens, (last, done) = stack.stream(**body)
    assert last == "done"
    assert {name for name, _ in tokens} == {"token"}
    assert [data["index"] for _, data in tokens] == list(range(len(tokens)))
    assert "".join(data["text"] for _, data in tokens) == done["text"] == whole["text"]
    assert not any("\ufffd" in data["text"] for _, data in tokens) or "\ufffd" in whole["text"]
    own = {"id", "timings"}
    assert {k: v for k, v in done.items() if k not in own} == {k: v for k, v in whole.items() if k not in own}
    assert len(tokens) > 10  # token by token, not at once


def test_tokens_come_while_the_rest_is_still_being_made(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = stack.engine.engine.runner.forward
    monkeypatch.setattr(stack.engine.engine.runner, "forward", lambda step: (time.sleep(0.05), forward(step))[1])
    began = time.monotonic()
    arrived = []
    body = {"prompt": "x", "max_new_tokens": 20, "stream": True}
    with stack.api.http.stream("POST", "/generate", json=body) as response:
        for line in response.iter_lines():
            if line.startswith("event: token"):
                arrived.append(time.monotonic() - began)
    assert arrived[-1] - arrived[0] > 0.5


def test_logprobs_name_each_token(stack: Stack) -> None:
    answer = stack.generate(prompt="import os", logprobs=2)
    entries = answer["logprobs"]
    assert [e["token_id"] for e in entries] == answer["token_ids"]
    for e in entries:
        assert len(e["top"]) == 2
        assert e["top"][0]["logprob"] >= e["top"][1]["logprob"]
        assert e["logprob"] == e["top"][0]["logprob"] <= 0  # greedy: the likeliest


def test_stop_strings_and_the_templates_own_end_the_text(stack: Stack) -> None:
    text = stack.generate(prompt="class A:", max_new_tokens=40)["text"]
    stop = text[10:13]
    answer = stack.generate(prompt="class A:", max_new_tokens=40, stop=stop)
    assert answer["text"] == text[: text.index(stop)]
    assert answer["finish_reason"] == "stop"
    assert stack.generate(prompt="class A:", max_new_tokens=40, stop=["never", stop])["text"] == answer["text"]


def test_a_seed_repeats(stack: Stack) -> None:
    body = {"adapter": "chatty", "prompt": "x", "temperature": 1.0}
    assert stack.generate(**body, seed=3)["token_ids"] == stack.generate(**body, seed=3)["token_ids"]
    assert stack.generate(**body)["token_ids"] != stack.generate(**body)["token_ids"]


def error(stack: Stack, status: int, **body: Any) -> dict[str, Any]:
    response = stack.api.http.post("/generate", json=body)
    assert response.status_code == status, response.text
    found: dict[str, Any] = response.json()["error"]
    assert found["message"]
    return found | {"retry": response.headers.get("retry-after")}


@pytest.mark.parametrize("stream", [False, True])
def test_an_unknown_adapter_is_404(stack: Stack, stream: bool) -> None:
    for name in ("nobody", "chatty@21"):
        assert error(stack, 404, adapter=name, prompt="x", stream=stream)["code"] == "adapter_not_found"


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_too_long_is_422_with_both_lengths(stack: Stack, stream: bool) -> None:
    found = error(stack, 422, prompt="a b c " * 300, stream=stream)
    assert found["code"] == "prompt_too_long"
    assert found["prompt_tokens"] > found["max_tokens"] == 256


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, "messages"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "nobody", "content": "x"}]}, "messages.0.role"),
        ({"adapter": "chatty", "inputs": {"a": 1}}, "inputs"),
        ({"adapter": "prompted", "inputs": {"nothing": "x"}}, "inputs.nothing"),
        ({"adapter": "prompted", "messages": [{"role": "user", "content": "x"}]}, "messages"),
        ({"adapter": "a b", "prompt": "x"}, "adapter"),
        ({"prompt": "x", "max_new_tokens": 0}, "max_new_tokens"),
        ({"prompt": "x", "temperature": -0.1}, "temperature"),
        ({"prompt": "x", "top_p": 1.5}, "top_p"),
        ({"prompt": "x", "top_k": -2}, "top_k"),
        ({"prompt": "x", "repetition_penalty": 0}, "repetition_penalty"),
        ({"prompt": "x", "logprobs": 21}, "logprobs"),
        ({"prompt": "x", "seed": "one"}, "seed"),
        ({"prompt": "x", "stop": [""]}, "stop"),
        ({"prompt": "x", "tools": [{}]}, "tools"),
        ({"prompt": "x", "max_tokens": 5}, "max_tokens"),
    ],
)
def test_bad_input_is_422_and_names_the_field(stack: Stack, body: dict[str, Any], param: str) -> None:
    assert (error(stack, 422, **body)["param"] or "").startswith(param)


def test_a_full_queue_is_503_and_a_client_that_leaves_frees_its_place(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = stack.engine.engine.scheduler
    forward = stack.engine.engine.runner.forward
    # Steps so slow that none of the eight is done before the last has come; greedy, so that none meets its end by chance.
    monkeypatch.setattr(stack.engine.engine.runner, "forward", lambda step: (time.sleep(0.2), forward(step))[1])
    body = {"prompt": "x", "max_new_tokens": 240, "stream": True, "temperature": 0}
    with httpx.Client(base_url=stack.api.url, timeout=30) as clients:
        open_ = [clients.send(clients.build_request("POST", "/generate", json=body), stream=True) for _ in range(8)]
        until(lambda: len(scheduler.running) == 4 and len(scheduler.waiting) == 4)
        found = error(stack, 503, prompt="x")
        assert found["code"] == "queue_full"
        assert int(found["retry"]) >= 1
        for response in open_:
            response.close()
    until(stack.engine.idle)
    assert stack.generate(prompt="x")["text"]


def test_a_client_that_leaves_a_json_answer_frees_its_place(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = stack.engine.engine.runner.forward
    began: list[Any] = []

    def slow(step: Any) -> Any:
        began.append(step)
        time.sleep(0.3)
        return forward(step)

    monkeypatch.setattr(stack.engine.engine.runner, "forward", slow)
    body = {"prompt": "x", "max_new_tokens": 250, "temperature": 0}
    host, _, port = stack.api.url.removeprefix("http://").partition(":")
    content = json.dumps(body).encode()
    head = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    with socket.create_connection((host, int(port))) as client:
        client.sendall(f"POST /generate HTTP/1.1\r\n{head}".encode() + content)
        until(lambda: began)
    until(stack.engine.idle, 30)  # all 250 steps would take 75 s


def test_without_an_engine_it_is_503_with_retry_after(
    sqlite_url: str, make_settings: Callable[..., Settings], stack: Stack
) -> None:
    with serve(make_settings(database_url=sqlite_url)) as lonely:
        for body in ({"prompt": "x"}, {"adapter": "small", "prompt": "x"}, {"prompt": "x", "stream": True}):
            response = lonely.http.post("/generate", json=body)
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "engine_unavailable"
            assert int(response.headers["retry-after"]) >= 1


def test_an_engine_that_breaks_off_ends_the_stream_with_an_error_event(
    tiny_base: Path, sqlite_url: str, make_settings: Callable[..., Settings], stack: Stack
) -> None:
    with serve_engine(engine_settings(tiny_base)) as engine:
        forward = engine.engine.runner.forward

        def broken(step: Any) -> Any:
            if engine.engine.steps > 5:
                raise RuntimeError("the device is gone")
            return forward(step)

        engine.engine.runner.forward = broken
        state = engine.server.config.app.state  # type: ignore[union-attr]
        ends, state.on_fatal = state.on_fatal, lambda: None  # it would end for its supervisor; first it still answers
        with serve(make_settings(database_url=sqlite_url, engine_url=engine.url)) as api:
            *tokens, (last, data) = Stack(api, engine, "").stream(prompt="x", max_new_tokens=50)
            assert tokens
            assert last == "error"
            assert data["error"]["code"] == "engine_failed"
            assert "the device is gone" in data["error"]["message"]
            after = api.http.post("/generate", json={"prompt": "x"})
            assert (after.status_code, after.json()["error"]["code"]) == (503, "engine_failed")
            ends()

            def code() -> str:
                answer = api.http.post("/generate", json={"prompt": "x"})
                assert answer.status_code == 503
                return str(answer.json()["error"]["code"])

            until(lambda: code() == "engine_unavailable")


def test_an_adapter_of_another_base_is_409(stack: Stack, folders: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(folders["small"], tmp_path / "alien")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/other"}))
    register(stack.api.db, "alien", folder, "org/other")
    assert error(stack, 409, adapter="alien", prompt="x")["code"] == "wrong_base"


def test_every_field_is_described(stack: Stack) -> None:
    schemas = stack.api.http.get("/openapi.json").json()["components"]["schemas"]
    for name in ("GenerateRequest", "GenerateResponse", "CompletionRequest", "ChatCompletionRequest"):
        for field, schema in schemas[name]["properties"].items():
            assert schema.get("description"), f"{name}.{field}"


@pytest.mark.slow
def test_the_built_in_model_answers_as_transformers_does(
    sqlite_url: str, make_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings = make_settings(database_url=sqlite_url, base_model="smollm2-135m-instruct")
    own = settings.model_copy(update={"engine_max_seq_length": 256})
    with serve_engine(own) as engine, serve(settings.model_copy(update={"engine_url": engine.url})) as api:
        answer = Stack(api, engine, "").generate(
            messages=[{"role": "user", "content": "Name a colour."}], max_new_tokens=24
        )
        path = engine.engine.runner.path
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path, dtype="float32")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Name a colour."}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    out = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert answer["token_ids"] == out.tolist()
    assert answer["text"] == tokenizer.decode(out, skip_special_tokens=True)
