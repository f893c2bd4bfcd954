"""Every bad input has an answer: a table of requests with the status, code and field they are answered with."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.conftest import Api
from tests.steps import adapter, cpt, error_of, fail, folder, ift, post, succeed, unique

NO_JOB = "job_" + "0" * 24
NO_FILE = "file-" + "0" * 24
HUGE = 10**30


@pytest.fixture(scope="module")
def world(api: Api) -> dict[str, str]:
    """Things the requests below name."""
    done = adapter(api, taken := unique("taken"), lora__r=8)
    other_base = adapter(api, foreign := unique("foreign"), model__name="org/other-base")
    failed = post(api, cpt(unique()))["id"]
    fail(api, failed)
    making = post(api, cpt(unfinished := unique("unfinished")))["id"]
    adapter(api, exported := unique("exported"))
    export = post(api, {"kind": "export", "adapter": exported})["id"]
    succeed(api, export)
    (api.settings.data_dir / "no-model").mkdir(exist_ok=True)
    return {
        "done": done, "taken": taken, "other_base": other_base, "foreign": foreign, "failed": failed, "making": making,
        "unfinished": unfinished, "export": export, "folder": str(api.settings.data_dir / "no-model"),
    }  # fmt: skip


def check(answer: httpx.Response, status: int, code: str, param: str | None) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error = error_of(answer)
    assert (error["code"], error["param"]) == (code, param), error
    assert error["message"]
    return error


# Bodies of POST /v1/jobs: what is changed in a good spec, then status, code, param.
CPT: list[tuple[dict[str, Any], int, str, str]] = [
    ({"no_such": 1}, 422, "unknown_field", "no_such"),
    ({"lora.rank": 8}, 422, "unknown_field", "lora.rank"),
    ({"dataset.template.prompts": "{a}"}, 422, "unknown_field", "dataset.template.prompts"),
    ({"init": {"adapter": "x"}}, 422, "unknown_field", "init"),
    ({"kind": ...}, 422, "invalid_value", "kind"),
    ({"kind": "sft"}, 422, "invalid_value", "kind"),
    ({"kind": ["cpt"]}, 422, "invalid_value", "kind"),
    ({"adapter": ...}, 422, "missing_field", "adapter"),
    ({"dataset": ...}, 422, "missing_field", "dataset"),
    ({"dataset.template": ...}, 422, "missing_field", "dataset.template"),
    ({"dataset": "org/set"}, 422, "invalid_value", "dataset"),
    ({"lora": []}, 422, "invalid_value", "lora"),
    ({"lora.r": -1}, 422, "invalid_value", "lora.r"),
    ({"lora.r": 0}, 422, "invalid_value", "lora.r"),
    ({"lora.r": 1.5}, 422, "invalid_value", "lora.r"),
    ({"lora.r": "many"}, 422, "invalid_value", "lora.r"),
    ({"lora.r": HUGE}, 422, "invalid_value", "lora.r"),
    ({"lora.r": None}, 422, "invalid_value", "lora.r"),
    ({"lora.lora_alpha": float("inf")}, 422, "invalid_value", "lora.lora_alpha"),
    ({"lora.lora_dropout": float("nan")}, 422, "invalid_value", "lora.lora_dropout"),
    ({"lora.lora_dropout": 1}, 422, "invalid_value", "lora.lora_dropout"),
    ({"lora.bias": "some"}, 422, "invalid_value", "lora.bias"),
    ({"lora.target_modules": []}, 422, "invalid_value", "lora.target_modules"),
    ({"lora.target_modules": ["q_proj", 3]}, 422, "invalid_value", "lora.target_modules.1"),
    ({"lora.target_modules": ["q_proj", "lm_head"]}, 422, "invalid_value", "lora.target_modules"),
    ({"lora.target_modules": ["q_proj", "q_proj"]}, 422, "invalid_value", "lora.target_modules"),
    ({"lora.loftq_config": {"loftq_bits": 8}}, 422, "invalid_value", "lora.loftq_config.loftq_bits"),
    ({"lora.loftq_config": {}, "model.load_in_4bit": False}, 422, "invalid_value", "lora.loftq_config"),
    ({"training.optim": "adamw_9bit"}, 422, "invalid_value", "training.optim"),
    ({"training.lr_scheduler_type": "zigzag"}, 422, "invalid_value", "training.lr_scheduler_type"),
    ({"training.learning_rate": 0}, 422, "invalid_value", "training.learning_rate"),
    ({"training.learning_rate": float("nan")}, 422, "invalid_value", "training.learning_rate"),
    ({"training.max_grad_norm": float("inf")}, 422, "invalid_value", "training.max_grad_norm"),
    ({"training.max_steps": 0}, 422, "invalid_value", "training.max_steps"),
    ({"training.packing": "maybe"}, 422, "invalid_value", "training.packing"),
    ({"training.seed": -1}, 422, "invalid_value", "training.seed"),
    ({"training.load_best_model_at_end": True, "training.save_steps": 3}, 422, "invalid_value", "training.save_steps"),
    ({"training.early_stopping_patience": 1, "dataset.test_size": 0}, 422, "invalid_value", "training"),
    ({"training.train_on_responses_only": True}, 422, "invalid_value", "training.train_on_responses_only"),
    ({"model.dtype": "int8"}, 422, "invalid_value", "model.dtype"),
    ({"model.max_seq_length": 1}, 422, "invalid_value", "model.max_seq_length"),
    ({"model.name": ""}, 422, "invalid_value", "model.name"),
    ({"model.name": "./no/such/folder"}, 422, "model_not_found", "model.name"),
    ({"model.name": "/no/such/folder"}, 422, "model_not_found", "model.name"),
    ({"model.name": "$folder"}, 422, "model_not_found", "model.name"),
    ({"model.name": "a/b/c"}, 422, "model_not_found", "model.name"),
    ({"model.name": "org/na\0me"}, 422, "invalid_value", "model.name"),
    ({"dataset.path": ...}, 422, "invalid_value", "dataset"),
    ({"dataset.file_id": NO_FILE}, 422, "invalid_value", "dataset"),
    ({"dataset.path": ..., "dataset.file_id": NO_FILE}, 404, "file_not_found", "dataset.file_id"),
    ({"dataset.path": ..., "dataset.file_id": "../../etc/passwd"}, 404, "file_not_found", "dataset.file_id"),
    ({"dataset.path": ..., "dataset.file_id": "\0"}, 422, "invalid_value", "dataset.file_id"),
    ({"dataset.path": "./no/such/folder"}, 422, "dataset_not_found", "dataset.path"),
    ({"dataset.streaming": True}, 422, "invalid_value", "dataset.streaming"),
    ({"dataset.test_size": 1.5}, 422, "invalid_value", "dataset.test_size"),
    ({"dataset.test_size": float("nan")}, 422, "invalid_value", "dataset.test_size"),
    ({"dataset.max_samples": 0}, 422, "invalid_value", "dataset.max_samples"),
    ({"dataset.template.prompt": ...}, 422, "invalid_value", "dataset.template"),
    ({"dataset.template.chat_template": "default"}, 422, "invalid_value", "dataset.template"),
    ({"dataset.template.response": "{a}"}, 422, "invalid_value", "dataset.template.response"),
    ({"dataset.template.prompt": "{text"}, 422, "invalid_template", "dataset.template.prompt"),
    ({"dataset.template.prompt": "text}"}, 422, "invalid_template", "dataset.template.prompt"),
    ({"dataset.template.prompt": "{}"}, 422, "invalid_template", "dataset.template.prompt"),
    ({"dataset.template.prompt": "no column"}, 422, "invalid_template", "dataset.template.prompt"),
    ({"adapter": ""}, 422, "invalid_value", "adapter"),
    ({"adapter": "a/b"}, 422, "invalid_value", "adapter"),
    ({"adapter": "../up"}, 422, "invalid_value", "adapter"),
    ({"adapter": "name@3"}, 422, "invalid_value", "adapter"),
    ({"adapter": "x" * 97}, 422, "invalid_value", "adapter"),
    ({"adapter": "nul\0"}, 422, "invalid_value", "adapter"),
    ({"adapter": NO_JOB}, 422, "invalid_value", "adapter"),
    ({"adapter": "$taken"}, 409, "adapter_exists", "adapter"),
    ({"adapter": "$unfinished"}, 409, "adapter_exists", "adapter"),
    ({"adapter": "smollm2-135m-instruct"}, 409, "adapter_exists", "adapter"),
    ({"adapter": "gpt", "model.name": "gpt"}, 409, "adapter_exists", "adapter"),
    ({"after": NO_JOB}, 422, "invalid_value", "after"),
    ({"after": [NO_JOB]}, 404, "job_not_found", "after.0"),
    ({"after": ["$done", "nonsense"]}, 404, "job_not_found", "after.1"),
    ({"after": ["\0"]}, 422, "invalid_value", "after.0"),
    ({"after": ["$failed"]}, 409, "parent_failed", "after.0"),
    ({"after": ["$done"] * 65}, 422, "invalid_value", "after"),
    ({"push_to_hub": {"repo_id": "no-owner"}}, 422, "invalid_value", "push_to_hub.repo_id"),
    ({"push_to_hub": {"repo_id": "owner/na--me"}}, 422, "invalid_value", "push_to_hub.repo_id"),
    ({"push_to_hub": {"repo_id": "owner/name", "revision": "-b"}}, 422, "invalid_value", "push_to_hub.revision"),
    ({"dataset.template.prompt": "{text}\ud800"}, 422, "invalid_value", "dataset.template.prompt"),
    ({"dataset.template.prompt": "{text}\0"}, 422, "invalid_value", "dataset.template.prompt"),
    ({"dataset.path": "org/\udfff"}, 422, "invalid_value", "dataset.path"),
    ({"after": ["\ud800"]}, 422, "invalid_value", "after.0"),
    ({"lora.target_modules": ["q_proj", "\udc00"]}, 422, "invalid_value", "lora.target_modules.1"),
    ({"odd\ud800": 1}, 422, "invalid_value", "odd\\ud800"),
    ({"training.learning_rate": 10**400}, 422, "invalid_value", "training.learning_rate"),
]
IFT: list[tuple[dict[str, Any], int, str, str]] = [
    ({"init": {}}, 422, "missing_field", "init.adapter"),
    ({"init.adapter": "no-such"}, 404, "adapter_not_found", "init.adapter"),
    ({"init.adapter": "$making", "after": ["$making"]}, 404, "adapter_not_found", "init.adapter"),
    ({"init.adapter": NO_JOB}, 404, "adapter_not_found", "init.adapter"),
    ({"init.adapter": "$taken@1"}, 404, "adapter_not_found", "init.adapter"),
    ({"init.adapter": f"$taken@{HUGE}"}, 404, "adapter_not_found", "init.adapter"),
    ({"init.adapter": "$taken@x"}, 422, "invalid_value", "init.adapter"),
    ({"init.adapter": "$unfinished"}, 404, "adapter_not_found", "init.adapter"),
    ({"init.adapter": "$foreign"}, 409, "base_mismatch", "init.adapter"),
    ({"init.adapter": "$taken", "model.name": "org/third"}, 409, "base_mismatch", "init.adapter"),
    ({"init.adapter": "$taken", "init.mode": "add"}, 422, "invalid_value", "init.mode"),
    ({"init.adapter": "$taken", "lora.r": 16}, 422, "lora_mismatch", "lora.r"),
    ({"init.adapter": "$taken", "lora.target_modules": ["q_proj"]}, 422, "lora_mismatch", "lora.target_modules"),
    ({"init.adapter": "$taken", "init.mode": "merge"}, 422, "invalid_value", "model.load_in_4bit"),
    ({"init.adapter": "$taken", "lora.loftq_config": {}}, 422, "invalid_value", "lora.loftq_config"),
    ({"dataset.template.response": ...}, 422, "invalid_value", "dataset.template.response"),
    ({"dataset.template.response": "{a"}, 422, "invalid_template", "dataset.template.response"),
    (
        {"dataset.template": {"chat_template": "{% for m in messages %}"}},
        422, "invalid_template", "dataset.template.chat_template",
    ),
]  # fmt: skip
EXPORT: list[tuple[dict[str, Any], int, str, str]] = [
    ({"adapter": "no-such"}, 404, "adapter_not_found", "adapter"),
    ({"adapter": "$unfinished"}, 404, "adapter_not_found", "adapter"),
    ({"adapter": "$export"}, 404, "adapter_not_found", "adapter"),
    ({"format": "onnx"}, 422, "invalid_value", "format"),
    ({"quantization_method": "q4_k_m"}, 422, "invalid_value", "quantization_method"),
    ({"format": "gguf", "quantization_method": "q9_9"}, 422, "invalid_value", "quantization_method"),
    ({"format": "gguf", "quantization_method": []}, 422, "invalid_value", "quantization_method"),
    ({"format": "gguf", "quantization_method": ["q8_0", "Q8_0"]}, 422, "invalid_value", "quantization_method"),
    ({"format": "merged_16bit", "quantization_method": "f16"}, 422, "invalid_value", "quantization_method"),
    ({"base": "org/original"}, 422, "invalid_value", "base"),
    ({"format": "merged_16bit", "base": "$folder"}, 422, "model_not_found", "base"),
    ({"format": "merged_16bit", "max_shard_size": "5"}, 422, "invalid_value", "max_shard_size"),
    ({"push_to_hub": {"repo_id": "https://hub/owner/name"}}, 422, "invalid_value", "push_to_hub.repo_id"),
    ({"push_to_hub": {"repo_id": "owner/name", "token": "hf_x"}}, 422, "unknown_field", "push_to_hub.token"),
    ({"training": {}}, 422, "unknown_field", "training"),
]


def named(value: Any, world: dict[str, str]) -> Any:
    """Put the world's names in place of $words."""
    if isinstance(value, str) and value.startswith("$"):
        word, at, step = value[1:].partition("@")
        return world[word] + at + step
    if isinstance(value, list):
        return [named(v, world) for v in value]
    if isinstance(value, dict):
        return {k: named(v, world) for k, v in value.items()}
    return value


def ids(case: tuple[dict[str, Any], int, str, str]) -> str:
    return ",".join(f"{k}={str(v)[:24]!r}" for k, v in case[0].items())


def refuse(api: Api, spec: dict[str, Any], status: int, code: str, param: str) -> None:
    import json

    before = api.http.get("/v1/jobs", params={"limit": 1}).json()["data"][0]["id"]
    # Python's json writes NaN and Infinity, which httpx's `json=` refuses to send.
    answer = api.http.post("/v1/jobs", content=json.dumps(spec), headers={"Content-Type": "application/json"})
    check(answer, status, code, param)
    assert api.http.get("/v1/jobs", params={"limit": 1}).json()["data"][0]["id"] == before, "nothing was stored"


@pytest.mark.parametrize("case", CPT, ids=ids)
def test_a_bad_cpt_spec_is_refused(api: Api, world: dict[str, str], case: Any) -> None:
    changes, status, code, param = case
    refuse(api, cpt(unique(), **named(changes, world)), status, code, param)


@pytest.mark.parametrize("case", IFT, ids=ids)
def test_a_bad_ift_spec_is_refused(api: Api, world: dict[str, str], case: Any) -> None:
    changes, status, code, param = case
    refuse(api, ift(unique(), **named(changes, world)), status, code, param)


@pytest.mark.parametrize("case", EXPORT, ids=ids)
def test_a_bad_export_spec_is_refused(api: Api, world: dict[str, str], case: Any) -> None:
    changes, status, code, param = case
    refuse(api, {"kind": "export", "adapter": world["taken"], **named(changes, world)}, status, code, param)


def test_a_base_mismatch_names_both_bases(api: Api, world: dict[str, str]) -> None:
    answer = api.http.post("/v1/jobs", json=ift(unique(), init={"adapter": world["foreign"]}))
    message = check(answer, 409, "base_mismatch", "init.adapter")["message"]
    assert "org/other-base" in message
    assert api.settings.base_model in message


def test_several_errors_are_all_named(api: Api) -> None:
    answer = api.http.post("/v1/jobs", json=cpt(unique(), lora__r=-1, training__optim="x", nonsense=1))
    message = error_of(answer)["message"]
    for field in ("lora.r", "training.optim", "nonsense"):
        assert field in message


LONG_KEY = {"Idempotency-Key": "k" * 256}
JSON = {"Content-Type": "application/json"}
# method, path, what else is sent, then status, code, param.
CALLS: list[tuple[str, str, dict[str, Any], int, str, str | None]] = [
    ("GET", "/nowhere", {}, 404, "not_found", None),
    ("GET", "/v1/jobs/", {}, 404, "not_found", None),
    ("PUT", "/v1/jobs", {}, 405, "method_not_allowed", None),
    ("DELETE", "/v1/jobs/$done", {}, 405, "method_not_allowed", None),
    ("POST", "/v1/jobs", {"content": "{", "headers": JSON}, 400, "invalid_json", None),
    ("POST", "/v1/jobs", {"content": b"\xff\xfe", "headers": JSON}, 400, "invalid_json", None),
    ("POST", "/v1/jobs", {"content": "[" * 100_000, "headers": JSON}, 400, "invalid_json", None),
    ("POST", "/v1/jobs", {"content": "", "headers": JSON}, 422, "missing_field", None),
    ("POST", "/v1/jobs", {"content": "[]", "headers": JSON}, 422, "invalid_value", None),
    ("POST", "/v1/jobs", {"content": "null", "headers": JSON}, 422, "invalid_value", None),
    ("POST", "/v1/jobs", {"content": "1", "headers": JSON}, 422, "invalid_value", None),
    ("POST", "/v1/jobs", {"content": "{}", "headers": {"Content-Type": "text/plain"}}, 415, "unsupported_media_type", None),
    ("POST", "/v1/jobs", {"data": {"kind": "cpt"}}, 415, "unsupported_media_type", None),
    ("POST", "/v1/jobs", {"json": cpt("x"), "headers": LONG_KEY}, 422, "invalid_value", "idempotency-key"),
    ("POST", "/v1/jobs", {"content": b" " * (33 * 2**20), "headers": JSON}, 413, "too_large", None),
    ("GET", "/v1/jobs?limit=0", {}, 422, "invalid_value", "limit"),
    ("GET", f"/v1/jobs?limit={HUGE}", {}, 422, "invalid_value", "limit"),
    ("GET", "/v1/jobs?limit=x", {}, 422, "invalid_value", "limit"),
    ("GET", "/v1/jobs?status=done", {}, 422, "invalid_value", "status"),
    ("GET", "/v1/jobs?kind=sft", {}, 422, "invalid_value", "kind"),
    ("GET", "/v1/jobs?after=%00", {}, 422, "invalid_value", "after"),
    ("GET", f"/v1/jobs/{NO_JOB}", {}, 404, "job_not_found", None),
    ("GET", "/v1/jobs/nonsense", {}, 404, "job_not_found", None),
    ("GET", "/v1/jobs/%00", {}, 404, "job_not_found", None),
    ("GET", "/v1/jobs/%F0%28%8C%28", {}, 404, "job_not_found", None),
    ("POST", f"/v1/jobs/{NO_JOB}/cancel", {}, 404, "job_not_found", None),
    ("POST", f"/v1/jobs/{NO_JOB}/pause", {}, 404, "job_not_found", None),
    ("POST", f"/v1/jobs/{NO_JOB}/resume", {}, 404, "job_not_found", None),
    ("POST", "/v1/jobs/$done/pause", {}, 409, "job_finished", None),
    ("POST", "/v1/jobs/$done/cancel", {}, 409, "job_finished", None),
    ("POST", "/v1/jobs/$failed/resume", {}, 409, "job_finished", None),
    ("POST", "/v1/jobs/$making/resume", {}, 409, "not_paused", None),
    ("GET", f"/v1/jobs/{NO_JOB}/events", {}, 404, "job_not_found", None),
    ("GET", f"/v1/jobs/{NO_JOB}/events", {"headers": {"Accept": "application/json"}}, 404, "job_not_found", None),
    ("GET", "/v1/jobs/$done/events", {"headers": {"Last-Event-ID": "x"}}, 422, "invalid_value", "Last-Event-ID"),
    ("GET", "/v1/jobs/$done/events", {"headers": {"Last-Event-ID": "9999"}}, 422, "invalid_value", "Last-Event-ID"),
    ("GET", "/v1/jobs/$done/events", {"headers": {"Last-Event-ID": "9" * 20}}, 422, "invalid_value", "Last-Event-ID"),
    ("GET", f"/v1/jobs/$done/events?after={HUGE}", {}, 422, "invalid_value", "after"),
    ("GET", f"/v1/jobs/{NO_JOB}/metrics", {}, 404, "job_not_found", None),
    ("GET", f"/v1/jobs/{NO_JOB}/checkpoints", {}, 404, "job_not_found", None),
    ("GET", f"/v1/jobs/{NO_JOB}/artifacts", {}, 404, "job_not_found", None),
    ("GET", f"/v1/jobs/{NO_JOB}/artifacts/a", {}, 404, "job_not_found", None),
    ("GET", "/v1/jobs/$export/artifacts/none.bin", {}, 404, "artifact_not_found", None),
    ("GET", f"/v1/jobs/{NO_JOB}/log", {}, 404, "job_not_found", None),
    ("GET", "/v1/loss.svg", {}, 422, "missing_field", "jobs"),
    ("GET", "/v1/loss.gif?jobs=$done", {}, 422, "invalid_value", "format"),
    ("GET", "/v1/loss.svg?jobs=,", {}, 422, "invalid_value", "jobs"),
    ("GET", f"/v1/loss.svg?jobs=$done,{NO_JOB}", {}, 404, "job_not_found", "jobs"),
    ("GET", "/v1/loss.svg?jobs=$export", {}, 422, "invalid_value", "jobs"),
    ("GET", f"/v1/files/{NO_FILE}", {}, 404, "file_not_found", None),
    ("GET", "/v1/files/%00", {}, 404, "file_not_found", None),
    ("GET", f"/v1/files/{NO_FILE}/content", {}, 404, "file_not_found", None),
    ("DELETE", f"/v1/files/{NO_FILE}", {}, 404, "file_not_found", None),
    ("GET", "/v1/files?limit=101", {}, 422, "invalid_value", "limit"),
    ("GET", "/v1/files?purpose=%00", {}, 422, "invalid_value", "purpose"),
    ("POST", "/v1/files", {"json": {}}, 415, "unsupported_media_type", None),
    ("POST", "/v1/files", {}, 415, "unsupported_media_type", None),
    ("GET", "/v1/adapters/none", {}, 404, "adapter_not_found", None),
    ("GET", "/v1/adapters/%00", {}, 404, "adapter_not_found", None),
    ("GET", "/v1/adapters/$unfinished", {}, 404, "adapter_not_found", None),
    ("GET", "/v1/adapters?after=a%00", {}, 422, "invalid_value", "after"),
    ("PATCH", "/v1/adapters/none", {"json": {"pinned": True}}, 404, "adapter_not_found", None),
    ("PATCH", "/v1/adapters/$taken", {"json": {}}, 422, "invalid_value", None),
    ("PATCH", "/v1/adapters/$taken", {"json": {"name": "a/b"}}, 422, "invalid_value", "name"),
    ("PATCH", "/v1/adapters/$taken", {"json": {"name": "$foreign"}}, 409, "adapter_exists", "name"),
    ("PATCH", "/v1/adapters/$taken", {"json": {"name": "smollm2-135m-instruct"}}, 409, "adapter_exists", "name"),
    ("PATCH", "/v1/adapters/$taken", {"json": {"r": 8}}, 422, "unknown_field", "r"),
    ("PATCH", "/v1/adapters/$taken", {"json": {"pinned": "perhaps"}}, 422, "invalid_value", "pinned"),
    ("DELETE", "/v1/adapters/none", {}, 404, "adapter_not_found", None),
    ("POST", "/v1/adapters/none/load", {}, 404, "adapter_not_found", None),
    ("POST", "/v1/adapters/$taken@99/load", {}, 404, "adapter_not_found", None),
    ("POST", "/v1/adapters/none/unload", {}, 404, "adapter_not_found", None),
    ("PATCH", "/v1/adapters/$taken", {"content": r'{"name": "a\ud800"}', "headers": JSON}, 422, "invalid_value", "name"),
    ("PATCH", "/v1/adapters/$taken", {"content": r'{"\ud800": 1}', "headers": JSON}, 422, "invalid_value", r"\ud800"),
    *(
        ("POST", path, {"content": content, "headers": JSON}, 422, "invalid_value", param)
        for path, content, param in (
            ("/generate", r'{"prompt": "\ud800"}', "prompt"),
            ("/generate", r'{"messages": [{"role": "user", "content": "\ud800"}]}', "messages.0.content"),
            ("/generate", r'{"inputs": {"a": {"b": ["\ud800"]}}}', "inputs.a.b.0"),
            ("/generate", '{"inputs": {"a": NaN}}', "inputs.a"),
            ("/generate", '{"inputs": {"a": 1e999}}', "inputs.a"),
            ("/generate", '{"inputs": {"a": ' + "[" * 200 + "]" * 200 + "}}", "inputs.a.0"),
            ("/generate", '{"messages": [], "tools": [{"x": -Infinity}]}', "tools.0.x"),
            ("/generate", r'{"prompt": "a", "stop": ["\ud800"]}', "stop.0"),
            ("/v1/completions", r'{"model": "m", "prompt": ["a", "\udc00"]}', "prompt.1"),
            ("/v1/completions", r'{"model": "\udc00", "prompt": "a"}', "model"),
            ("/v1/chat/completions", r'{"model": "m", "messages": [{"role": "user", "content": "\ud800"}]}',
             "messages.0.content"),
        )
    ),
    ("GET", "/readyz?parts=kitchen", {}, 422, "invalid_value", "parts"),
]  # fmt: skip


@pytest.mark.parametrize("case", CALLS, ids=lambda c: f"{c[0]} {c[1][:60]} {str(c[2])[:30]}")
def test_a_bad_call_is_refused(api: Api, world: dict[str, str], case: Any) -> None:
    method, path, more, status, code, param = case
    for word, name in world.items():
        path = path.replace(f"${word}", name) if word != "folder" else path
    if "json" in more:
        more = {**more, "json": named(more["json"], world)}
    check(api.http.request(method, path, **more), status, code, param)


@pytest.mark.parametrize(
    ("name", "content", "status", "code"),
    [
        ("a.jsonl", b"", 422, "invalid_file"),
        ("a.txt", b" \n\n", 422, "invalid_file"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": "\xff"}\n', 422, "invalid_file"),
        ("a.txt", "half a character: 한".encode()[:-1], 422, "invalid_file"),
        ("a.csv", "a,b\n1,2\n".encode("utf-16"), 422, "invalid_file"),
        ("a.parquet", b"", 422, "invalid_file"),
        ("a.parquet", b"PAR1" + b"x" * 100, 422, "invalid_file"),
        ("a.parquet", b"PAR1" + b"\xff\xff\xff\x7f" + b"PAR1", 422, "invalid_file"),
        ("a.parquet", b"not parquet at all", 422, "invalid_file"),
        ("a.zip", b"PK", 415, "unsupported_format"),
        ("noextension", b"x", 415, "unsupported_format"),
        ("a.jsonl.exe", b"x", 415, "unsupported_format"),
    ],
)
def test_a_bad_upload_leaves_nothing_behind(api: Api, name: str, content: bytes, status: int, code: str) -> None:
    before = api.http.get("/v1/files").json()["data"]
    check(api.http.post("/v1/files", files={"file": (name, content)}), status, code, "file")
    assert api.http.get("/v1/files").json()["data"] == before
    folder(api.settings.files_dir)
    kept = {p.name.split(".")[0] for p in api.settings.files_dir.iterdir()} - {"lorry_template"}
    assert kept == {f["id"] for f in before}


def test_bad_utf_8_is_named_by_byte_and_line(api: Api) -> None:
    content = b"first\nsecond " + "한".encode() * 500_000 + b"\n third\xe2\x28\n"
    message = error_of(api.http.post("/v1/files", files={"file": ("a.txt", content)}))["message"]
    offset = content.index(b"\xe2\x28")
    assert f"byte {offset}, line 3" in message


@pytest.mark.parametrize(
    ("form", "status", "code", "param"),
    [
        ({"data": {"purpose": "x"}, "files": {"other": ("a.txt", b"x")}}, 422, "missing_field", "file"),
        ({"data": {"purpose": "Not a purpose!"}, "files": {"file": ("a.txt", b"x")}}, 422, "invalid_value", "purpose"),
        ({"data": {"pupose": "fine-tune"}, "files": {"file": ("a.txt", b"x")}}, 422, "unknown_field", "pupose"),
        ({"data": {"big": "x" * 100_000}, "files": {"file": ("a.txt", b"x")}}, 422, "invalid_value", "big"),
        ({"files": [("file", ("a.txt", b"x")), ("file", ("b.txt", b"y"))]}, 422, "invalid_value", "file"),
        (
            {"content": b"--b\r\nbroken", "headers": {"Content-Type": "multipart/form-data; boundary=b"}},
            400, "invalid_multipart", None,
        ),
        (
            {
                "content": b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.txt"\r\n\r\ncut off',
                "headers": {"Content-Type": "multipart/form-data; boundary=b"},
            },
            400, "invalid_multipart", None,
        ),
        ({"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}, 415, "unsupported_media_type", None),
    ],
)  # fmt: skip
def test_a_bad_form_is_refused(api: Api, form: dict[str, Any], status: int, code: str, param: str | None) -> None:
    check(api.http.post("/v1/files", **form), status, code, param)
