"""The API with a real vLLM server in the engine's place: completions, chats, streams, adapters that come and go."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from benchmarks.common import free_port
from service.settings import Settings
from tests.conftest import Api, serve
from tests.serving import KINDS, PROJECTIONS, make_adapter, register

OWN_PATH = os.environ.get("VLLM_PYTHONPATH")  # of the server, if vLLM and what it needs lie apart
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not (OWN_PATH or importlib.util.find_spec("vllm")), reason="needs vLLM"),
]
CONTEXT = 256
LORAS = {
    "one": {"r": 8, "lora_alpha": 16, "target_modules": PROJECTIONS},
    "two": {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "three": {"r": 16, "lora_alpha": 8, "use_rslora": True, "target_modules": PROJECTIONS},
}


@pytest.fixture(scope="module")
def folders(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    made = {n: make_adapter(base, root / n, seed=i, **lora) for i, (n, lora) in enumerate(LORAS.items())}  # type: ignore[arg-type]
    return made | {"own": make_adapter(base, root / "own", seed=9, **KINDS["full"])}


@pytest.fixture(scope="module")
def vllm(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Two adapters at once, three registered: they take turns in its memory too."""
    port, log = free_port(), tmp_path_factory.mktemp("vllm") / "log"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(base), "--port", str(port)]
    command += ["--dtype", "bfloat16", "--max-model-len", str(CONTEXT), "--gpu-memory-utilization", "0.2"]
    command += ["--enable-lora", "--max-loras", "2", "--max-cpu-loras", "2", "--max-lora-rank", "16", "--enforce-eager"]
    environment = {**os.environ, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
    if OWN_PATH:
        environment["PYTHONPATH"] = OWN_PATH
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
            until = time.monotonic() + 240
            while True:
                try:
                    if http.get("/health").status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                assert process.poll() is None, log.read_text("utf-8", "replace")[-20000:]
                assert time.monotonic() < until, log.read_text("utf-8", "replace")[-6000:]
                time.sleep(0.5)
            yield http
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def api(
    base: Path, vllm: httpx.Client, folders: dict[str, Path], sqlite_url: str, make_settings: Callable[..., Settings]
) -> Iterator[Api]:
    with serve(make_settings(database_url=sqlite_url, engine_url=str(vllm.base_url).rstrip("/"))) as served:
        for name, folder in folders.items():
            register(served.db, name, folder, str(base), config={"train_embeddings": name == "own"})
        yield served


def generate(api: Api, **body: Any) -> dict[str, Any]:
    response = api.http.post("/generate", json={"max_new_tokens": 12, "temperature": 0, **body})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def direct(vllm: httpx.Client, model: str, prompt: str) -> str:
    response = vllm.post("/v1/completions", json={"model": model, "prompt": prompt, "max_tokens": 12, "temperature": 0})
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["text"]
    return text


def loaded(vllm: httpx.Client) -> set[str]:
    return {card["id"] for card in vllm.get("/v1/models").json()["data"] if card.get("parent")}


def test_adapters_and_the_base_answer_as_vllm_does_alone(api: Api, vllm: httpx.Client, base: Path) -> None:
    texts = {}
    for name in LORAS:
        answer = generate(api, adapter=name, prompt="import os", logprobs=1)
        assert answer["usage"]["completion_tokens"] == len(answer["token_ids"]) == len(answer["logprobs"]) == 12
        assert 0 < answer["timings"]["queue_ms"] <= answer["timings"]["first_token_ms"]
        assert answer["text"] == direct(vllm, name, "import os")
        texts[name] = answer["text"]
    texts["base"] = generate(api, prompt="import os")["text"]
    assert texts["base"] == direct(vllm, str(base), "import os")
    assert len(set(texts.values())) == 4
    for name in LORAS:  # more than it has places for
        assert generate(api, adapter=name, prompt="import os")["text"] == texts[name]


def test_a_stream_comes_in_pieces_and_is_the_whole_text(api: Api) -> None:
    whole = generate(api, adapter="one", prompt="def f", max_new_tokens=20)["text"]
    events: list[tuple[str, dict[str, Any]]] = []
    body = {"adapter": "one", "prompt": "def f", "max_new_tokens": 20, "temperature": 0, "stream": True}
    with api.http.stream("POST", "/generate", json=body) as response:
        kind = ""
        for line in response.iter_lines():
            if line.startswith("event: "):
                kind = line[7:]
            elif line.startswith("data: "):
                events.append((kind, json.loads(line[6:])))
    assert len(events) > 3
    assert events[-1][0] == "done"
    assert events[-1][1]["text"] == whole


def test_chats_go_through_the_adapters_template(api: Api) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    asked = {"model": "one", "messages": messages, "temperature": 0, "max_tokens": 12}
    answer = api.http.post("/v1/chat/completions", json=asked)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"] == generate(api, adapter="one", messages=messages)["text"]


def test_an_adapter_that_vllm_has_dropped_is_loaded_again(api: Api, vllm: httpx.Client) -> None:
    before = generate(api, adapter="one", prompt="x")["text"]
    assert vllm.post("/v1/unload_lora_adapter", json={"lora_name": "one"}).status_code == 200
    assert generate(api, adapter="one", prompt="x")["text"] == before


def test_a_name_that_stands_for_other_files_is_replaced(api: Api, vllm: httpx.Client, folders: dict[str, Path]) -> None:
    before = generate(api, adapter="one", prompt="x")["text"]
    vllm.post("/v1/unload_lora_adapter", json={"lora_name": "one"})
    vllm.post("/v1/load_lora_adapter", json={"lora_name": "one", "lora_path": str(folders["three"])})
    api.app.state.engine.engines[0]._loaded.clear()  # as in an API that was started since
    assert generate(api, adapter="one", prompt="x")["text"] == before


def test_load_and_unload_and_pins(api: Api, vllm: httpx.Client) -> None:
    assert api.http.post("/v1/adapters/two/load").status_code == 200
    assert "two" in loaded(vllm)
    assert api.http.get("/v1/adapters/two").json()["loaded"]
    assert api.http.patch("/v1/adapters/two", json={"pinned": True}).status_code == 200
    assert "two" in loaded(vllm)
    for _ in range(2):
        assert api.http.post("/v1/adapters/two/unload").status_code == 200
    assert "two" not in loaded(vllm)


def test_what_vllm_cannot_take_is_told(api: Api, vllm: httpx.Client) -> None:
    refused = api.http.post("/generate", json={"adapter": "own", "prompt": "x"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "not_servable")
    assert "own" not in loaded(vllm)
    long = api.http.post("/generate", json={"adapter": "one", "prompt": "a b " * 300})
    assert (long.status_code, long.json()["error"]["code"]) == (422, "prompt_too_long"), long.text
    assert generate(api, adapter="one", prompt="x")["text"]
