"""The application as a whole: health, request ids, keys, errors outside any endpoint, OpenAPI, figures of its own."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psycopg
import pytest
from rq import Worker
from sqlalchemy.engine import make_url

from service.app import create_app
from service.jobs import repository
from service.migrate import upgrade
from service.settings import Settings
from tests.conftest import Api, free_port, new_database, serve
from tests.steps import cpt, error_of, post, start, unique


def test_liveness_answers(api: Api) -> None:
    assert api.http.get("/healthz").json() == {"status": "ok"}


def test_readiness_names_each_part(api: Api) -> None:
    answer = api.http.get("/readyz")
    body = answer.json()
    assert answer.status_code == 503
    assert {name: part["ok"] for name, part in body["parts"].items()} == {
        "database": True, "queue": True, "workers": False, "engine": False,
    }  # fmt: skip
    assert "lorry worker" in body["parts"]["workers"]["detail"]
    some = api.http.get("/readyz", params={"parts": "database,queue"})
    assert (some.status_code, some.json()["ready"], len(some.json()["parts"])) == (200, True, 2)


def test_a_registered_worker_makes_workers_ready(api: Api) -> None:
    worker = Worker([api.queue.rq], connection=api.queue.redis, name=unique("w"))
    worker.register_birth()
    try:
        assert api.http.get("/readyz", params={"parts": "workers"}).status_code == 200
    finally:
        worker.register_death()
    assert api.http.get("/readyz", params={"parts": "workers"}).status_code == 503


def test_readiness_says_that_the_queue_is_away(sqlite_url: str, make_settings: Callable[..., Settings]) -> None:
    with serve(make_settings(database_url=sqlite_url, redis_url=f"redis://127.0.0.1:{free_port()}/0")) as api:
        parts = api.http.get("/readyz").json()["parts"]
        assert (parts["database"]["ok"], parts["queue"]["ok"], parts["workers"]["ok"]) == (True, False, False)
        assert api.http.get("/healthz").status_code == 200
        assert "\nlorry_queue_length{" not in api.http.get("/metrics").text, "unknown is not zero"


def test_a_database_that_goes_away_is_503_and_comes_back(
    postgres: str, request: pytest.FixtureRequest, tmp_path: Path, make_settings: Callable[..., Settings]
) -> None:
    url = new_database("postgres", tmp_path, request)
    upgrade(url)
    name = make_url(url).database
    with (
        serve(make_settings(database_url=url, reconcile_seconds=60)) as api,
        psycopg.connect(postgres, autocommit=True) as admin,
    ):
        job = post(api, cpt(unique()))
        admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])
        for call in (lambda: api.http.get("/v1/jobs"), lambda: api.http.post("/v1/jobs", json=cpt(unique()))):
            answer = call()
            assert (answer.status_code, error_of(answer)["code"]) == (503, "database_unavailable")
            assert int(answer.headers["retry-after"]) > 0
        assert api.http.get("/readyz").json()["parts"]["database"]["ok"] is False
        assert api.http.get("/healthz").status_code == 200
        admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
        assert [j["id"] for j in api.http.get("/v1/jobs").json()["data"]] == [job["id"]]


def test_the_application_does_not_start_on_a_database_without_tables(make_settings: Callable[..., Settings]) -> None:
    app = create_app(make_settings())

    async def begin() -> None:
        async with app.router.lifespan_context(app):
            pass

    with pytest.raises(RuntimeError, match="lorry migrate"):
        asyncio.run(begin())


# Requests


def test_a_request_id_is_given_or_taken_over(api: Api) -> None:
    assert api.http.get("/healthz", headers={"X-Request-Id": "abc-123"}).headers["x-request-id"] == "abc-123"
    given = api.http.get("/nowhere").headers["x-request-id"]
    assert re.fullmatch(r"req_[0-9a-f]{24}", given)
    assert api.http.get("/healthz").headers["x-request-id"] != given
    for bad in ("a b", "x" * 200, "<script>"):
        assert api.http.get("/healthz", headers={"X-Request-Id": bad}).headers["x-request-id"].startswith("req_")


def test_an_unforeseen_error_is_a_500_with_the_request_s_id(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> None:
        raise ZeroDivisionError("secret detail")

    api.app.add_api_route("/broken", broken)
    answer = api.http.get("/broken", headers={"X-Request-Id": "trace-me"})
    error = error_of(answer)
    assert (answer.status_code, error["code"], error["type"]) == (500, "internal_error", "server_error")
    assert "trace-me" in error["message"]
    assert "secret detail" not in answer.text
    logged = [r for r in caplog.records if "trace-me" in r.getMessage()]
    assert logged
    assert logged[0].exc_info is not None
    assert logged[0].exc_info[0] is ZeroDivisionError


def test_405_says_what_is_allowed(api: Api) -> None:
    assert api.http.put("/v1/jobs").headers["allow"]


# Keys

KEY = "s3cret-schlüssel"


@pytest.fixture(scope="module")
def guarded(sqlite_url: str, make_settings: Callable[..., Settings]) -> Iterator[Api]:
    with serve(make_settings(database_url=sqlite_url, api_key=KEY)) as api:
        yield api


CALLS = [
    ("GET", "/v1/jobs"), ("POST", "/v1/jobs"), ("GET", "/v1/files"), ("POST", "/v1/files"), ("GET", "/v1/adapters"),
    ("POST", "/generate"), ("GET", "/v1/models"), ("POST", "/v1/chat/completions"), ("GET", "/metrics"),
    ("GET", "/docs"), ("GET", "/openapi.json"), ("GET", "/nowhere"), ("GET", "/healthz/"), ("GET", "//healthz"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), CALLS)
@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer wrong", f"Basic {KEY}", KEY, f"Bearer {KEY}x", f"Bearer {KEY[:-1]}"],
)
def test_without_the_key_every_call_is_401(guarded: Api, method: str, path: str, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header.encode()}
    answer = httpx.request(method, guarded.url + path, headers=headers)
    assert (answer.status_code, error_of(answer)["code"]) == (401, "invalid_api_key")
    assert answer.headers["www-authenticate"] == "Bearer"


def test_with_the_key_calls_are_served(guarded: Api) -> None:
    assert guarded.http.get("/v1/jobs").status_code == 200
    assert guarded.http.get("/metrics").status_code == 200
    lower = httpx.get(f"{guarded.url}/v1/jobs", headers={"Authorization": f"bearer {KEY}".encode()})
    assert lower.status_code == 200, "the scheme's case does not matter"


def test_health_needs_no_key(guarded: Api) -> None:
    assert httpx.get(f"{guarded.url}/healthz").status_code == 200
    assert httpx.get(f"{guarded.url}/readyz").status_code == 503


def test_the_description_says_that_a_key_is_needed(guarded: Api) -> None:
    schemes = guarded.http.get("/openapi.json").json()["components"]["securitySchemes"]
    assert [(s["type"], s["scheme"]) for s in schemes.values()] == [("http", "bearer")]


# OpenAPI


def test_every_field_and_parameter_is_described(api: Api) -> None:
    document = api.http.get("/openapi.json").json()
    bare = [
        f"{name}.{field}"
        for name, schema in document["components"]["schemas"].items()
        for field, about in schema.get("properties", {}).items()
        if not about.get("description")
    ]
    for path, methods in document["paths"].items():
        for method, call in methods.items():
            assert call.get("summary"), f"{method} {path}"
            bare += [f"{method} {path} {p['name']}" for p in call.get("parameters", []) if not p.get("description")]
            for body in call.get("requestBody", {}).get("content", {}).values():
                schema = body["schema"]
                bare += [f"{path} {f}" for f, a in schema.get("properties", {}).items() if not a.get("description")]
    assert bare == []


def test_the_document_has_the_contract_s_calls(api: Api) -> None:
    paths = api.http.get("/openapi.json").json()["paths"]
    calls = {(method.upper(), path) for path, methods in paths.items() for method in methods}
    for method, path in [
        ("POST", "/v1/files"), ("GET", "/v1/files"), ("GET", "/v1/files/{file_id}"), ("DELETE", "/v1/files/{file_id}"),
        ("GET", "/v1/files/{file_id}/content"), ("POST", "/v1/jobs"), ("GET", "/v1/jobs"), ("GET", "/v1/jobs/{job_id}"),
        ("POST", "/v1/jobs/{job_id}/cancel"), ("POST", "/v1/jobs/{job_id}/pause"), ("POST", "/v1/jobs/{job_id}/resume"),
        ("GET", "/v1/jobs/{job_id}/events"), ("GET", "/v1/jobs/{job_id}/metrics"),
        ("GET", "/v1/jobs/{job_id}/checkpoints"), ("GET", "/v1/loss.{format}"), ("GET", "/v1/jobs/{job_id}/artifacts"),
        ("GET", "/v1/jobs/{job_id}/artifacts/{path}"), ("GET", "/v1/adapters"), ("GET", "/v1/adapters/{name}"),
        ("PATCH", "/v1/adapters/{name}"), ("DELETE", "/v1/adapters/{name}"), ("POST", "/v1/adapters/{name}/load"),
        ("POST", "/v1/adapters/{name}/unload"), ("POST", "/generate"), ("GET", "/v1/models"),
        ("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("GET", "/healthz"), ("GET", "/readyz"),
        ("GET", "/metrics"),
    ]:  # fmt: skip
        assert (method, path) in calls


# Metrics


def test_metrics_tell_of_jobs_queue_requests_and_running_training(api: Api) -> None:
    waiting = post(api, cpt(unique()))
    job = post(api, cpt(unique()))
    run = start(api, job["id"])
    with api.db.write() as session:
        repository.own(session, job["id"], run, progress={"step": 7, "total_steps": 9, "tokens_per_second": 12.5})
        repository.put_metrics(session, job["id"], [("train", 5, {"loss": 2.5}), ("eval", 5, {"eval_loss": 2.25})])
    text = api.http.get("/metrics").text
    labels = f'adapter="{job["adapter"]}",job="{job["id"]}",kind="cpt"'
    values = {}
    for line in text.splitlines():
        name, _, value = line.rpartition(" ")
        match = re.fullmatch(r"(\w+)\{(.*)\}", name)
        values[(match[1], ",".join(sorted(match[2].split(",")))) if match else (name, "")] = value
    assert float(values["lorry_job_loss", labels]) == 2.5
    assert float(values["lorry_job_eval_loss", labels]) == 2.25
    assert float(values["lorry_job_tokens_per_second", labels]) == 12.5
    assert float(values["lorry_job_step", labels]) == 7
    assert float(values["lorry_jobs", 'kind="cpt",status="running"']) >= 1
    assert float(values["lorry_queue_length", f'queue="{api.queue.name}"']) >= 1
    assert waiting["id"] not in text, "only running jobs have series"
    posts = 'method="POST",route="/v1/jobs",status="202"'
    assert float(values["lorry_http_request_seconds_count", posts]) >= 2
    assert not any("job_" in labels for name, labels in values if name.startswith("lorry_http")), "routes, not paths"
