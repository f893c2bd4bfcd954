"""Jobs over HTTP: making, listing, following states, and what two clients do at once."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import event
from sqlalchemy.orm import Session

from service.jobs import repository
from service.models import JobRow
from tests.conftest import Api
from tests.steps import (
    adapter,
    checkpoint,
    cpt,
    error_of,
    fail,
    ift,
    post,
    start,
    succeed,
    unique,
)


def until(api: Api, job_id: str, status: str) -> dict[str, Any]:
    """The job, once it is in that state."""
    for _ in range(100):
        job: dict[str, Any] = api.http.get(f"/v1/jobs/{job_id}").json()
        if job["status"] == status:
            return job
        threading.Event().wait(0.05)
    raise AssertionError(f"job {job_id} is {job['status']}, not {status}")


def test_a_job_is_accepted_with_its_address_and_every_default_filled_in(api: Api) -> None:
    answer = api.http.post("/v1/jobs", json=cpt(name := unique(), lora__r=8))
    job = answer.json()
    assert answer.status_code == 202
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
    assert api.http.get(answer.headers["location"]).json() == {
        **job,
        "runs": [],
        "queue": {"name": api.queue.name, "workers": 0},
    }
    assert (job["object"], job["kind"], job["status"], job["adapter"], job["attempt"]) == (
        "job",
        "cpt",
        "queued",
        name,
        1,
    )
    assert job["spec"]["model"]["name"] == api.settings.base_model
    assert job["spec"]["lora"]["r"] == 8
    assert job["spec"]["lora"]["lora_alpha"] == 128
    assert job["spec"]["training"]["learning_rate"] == 5e-5
    assert job["lineage"] == {"base": api.settings.base_model, "parent": None, "jobs": []}
    assert isinstance(job["created_at"], int)
    assert job["id"] in api.queue.waiting()


def test_a_worker_s_run_shows_in_the_job(api: Api) -> None:
    job = post(api, cpt(unique()))
    run = start(api, job["id"])
    with api.db.write() as session:
        progress = {
            "step": 3,
            "total_steps": 10,
            "epoch": 0.3,
            "tokens": 99,
            "tokens_per_second": 5.5,
            "eta_seconds": 7,
        }
        repository.own(session, job["id"], run, progress=progress)
        repository.put_metrics(session, job["id"], [("train", 3, {"loss": 2.5, "epoch": 0.3})])
        repository.put_metrics(session, job["id"], [("eval", 3, {"eval_loss": 2.25}), ("train", 1, {"loss": 3.0})])
    seen = api.http.get(f"/v1/jobs/{job['id']}").json()
    assert seen["progress"] == {**progress, "phase": None}
    assert seen["status"] == "running"
    assert [(r["attempt"], r["worker"], r["outcome"]) for r in seen["runs"]] == [(1, "test-worker", None)]
    assert api.http.get(f"/v1/jobs/{job['id']}/metrics").json() == {
        "train": [{"step": 1, "loss": 3.0}, {"step": 3, "loss": 2.5, "epoch": 0.3}],
        "eval": [{"step": 3, "eval_loss": 2.25}],
    }
    succeed(api, job["id"], run)
    done = api.http.get(f"/v1/jobs/{job['id']}").json()
    assert (done["status"], done["result"], done["runs"][0]["outcome"]) == (
        "succeeded",
        {"eval_loss": 1.5},
        "succeeded",
    )
    assert isinstance(done["finished_at"], int)


def test_lists_walk_by_cursor_and_filter(api: Api) -> None:
    before = api.http.get("/v1/jobs", params={"limit": 1}).json()["data"]
    made = [post(api, cpt(unique()))["id"] for _ in range(5)]
    made.append(post(api, ift(unique()))["id"])
    for job_id in made[:2]:
        api.http.post(f"/v1/jobs/{job_id}/cancel")
    walked: list[str] = []
    after: str | None = None
    while True:
        page = api.http.get("/v1/jobs", params={"limit": 2, **({"after": after} if after else {})}).json()
        assert page["object"] == "list"
        walked += [j["id"] for j in page["data"]]
        after = page["next"]
        assert page["has_more"] == (after is not None)
        if not after or (before and before[0]["id"] in walked):
            break
    assert walked[:6] == made[::-1]
    queued = api.http.get("/v1/jobs", params={"kind": "cpt", "status": "queued", "limit": 3}).json()["data"]
    assert [j["id"] for j in queued] == made[4:1:-1]
    assert api.http.get("/v1/jobs", params={"kind": "ift", "limit": 1}).json()["data"][0]["id"] == made[5]


# Idempotency and races


def test_the_same_key_and_body_give_the_same_job(api: Api) -> None:
    spec, key = cpt(unique()), unique("k")
    first = post(api, spec, Idempotency_Key=key)
    again = api.http.post("/v1/jobs", json=spec, headers={"Idempotency-Key": key})
    assert again.status_code == 202
    assert again.json()["id"] == first["id"]
    assert again.headers["idempotent-replayed"] == "true"
    other = api.http.post("/v1/jobs", json=cpt(unique()), headers={"Idempotency-Key": key})
    assert (other.status_code, error_of(other)["code"]) == (409, "idempotency_conflict")


def test_a_hundred_posts_at_once_with_one_key_make_one_job(api: Api) -> None:
    spec, key = cpt(unique()), unique("k")
    with httpx.Client(base_url=api.url, timeout=60, limits=httpx.Limits(max_connections=32)) as http:

        def send(_: int) -> tuple[int, str]:
            answer = http.post("/v1/jobs", json=spec, headers={"Idempotency-Key": key})
            return answer.status_code, answer.json().get("id", answer.text)

        with ThreadPoolExecutor(32) as pool:
            answers = set(pool.map(send, range(100)))
    assert len(answers) == 1
    status, job_id = answers.pop()
    assert status == 202
    rows = [j for j in api.http.get("/v1/jobs", params={"limit": 5}).json()["data"] if j["adapter"] == spec["adapter"]]
    assert [r["id"] for r in rows] == [job_id]


def test_of_posts_at_once_for_one_adapter_name_one_wins(api: Api) -> None:
    spec = cpt(unique())
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: api.http.post("/v1/jobs", json=spec), range(8)))
    assert sorted(a.status_code for a in answers) == [202] + [409] * 7
    refused = [error_of(a) for a in answers if a.status_code == 409]
    assert {(e["code"], e["param"]) for e in refused} == {("adapter_exists", "adapter")}


def test_cancel_and_a_worker_s_claim_at_once_never_lose_the_job(api: Api) -> None:
    """Either the worker has it and is asked to end, or it is cancelled and the worker gets nothing."""
    for _ in range(20):
        job_id = post(api, cpt(unique()))["id"]
        gate = threading.Barrier(2)
        claimed: list[JobRow | None] = []

        def claim(job_id: str = job_id, gate: threading.Barrier = gate, claimed: list[Any] = claimed) -> None:
            gate.wait()
            with api.db.write() as session:
                claimed.append(repository.claim(session, job_id, unique("run"), "racer"))

        racer = threading.Thread(target=claim)
        racer.start()
        gate.wait()
        answer = api.http.post(f"/v1/jobs/{job_id}/cancel")
        racer.join()
        job = answer.json()
        if claimed[0] is None:
            assert (answer.status_code, job["status"]) == (200, "cancelled")
        else:
            assert (answer.status_code, job["control"]) == (202, "cancel")
            with api.db.write() as session:
                assert repository.transition(session, job_id, ["preparing"], "cancelled")


# Pause, resume, cancel


def test_a_queued_job_pauses_at_once_and_resumes(api: Api) -> None:
    job_id = post(api, cpt(unique()))["id"]
    paused = api.http.post(f"/v1/jobs/{job_id}/pause")
    assert (paused.status_code, paused.json()["status"]) == (200, "paused")
    assert job_id not in api.queue.waiting()
    again = api.http.post(f"/v1/jobs/{job_id}/pause")
    assert (again.status_code, error_of(again)["code"]) == (409, "job_paused")
    resumed = api.http.post(f"/v1/jobs/{job_id}/resume")
    assert (resumed.status_code, resumed.json()["status"]) == (200, "queued")
    assert job_id in api.queue.waiting()
    twice = api.http.post(f"/v1/jobs/{job_id}/resume")
    assert (twice.status_code, error_of(twice)["code"]) == (409, "not_paused")


def test_a_running_job_is_asked_and_cancel_outweighs_pause(api: Api) -> None:
    job_id = post(api, cpt(unique()))["id"]
    run = start(api, job_id)
    for _ in range(2):  # asking twice is no error
        paused = api.http.post(f"/v1/jobs/{job_id}/pause")
        assert (paused.status_code, paused.json()["status"], paused.json()["control"]) == (202, "running", "pause")
    cancelled = api.http.post(f"/v1/jobs/{job_id}/cancel")
    assert (cancelled.status_code, cancelled.json()["control"]) == (202, "cancel")
    refused = api.http.post(f"/v1/jobs/{job_id}/pause")
    assert (refused.status_code, error_of(refused)["code"]) == (409, "job_cancelling")
    with api.db.write() as session:
        assert repository.own(session, job_id, run) == "cancel"
        assert repository.transition(session, job_id, ["running"], "cancelled", run_id=run)
    for call in ("cancel", "pause", "resume"):
        answer = api.http.post(f"/v1/jobs/{job_id}/{call}")
        assert (answer.status_code, error_of(answer)["code"]) == (409, "job_finished")


def test_cancelling_gives_the_adapter_s_name_back_and_fails_the_children(api: Api) -> None:
    parent = post(api, cpt(name := unique()))
    child = post(api, ift(unique(), after=[parent["id"]], init={"adapter": name, "mode": "stack"}))
    grandchild = post(api, {"kind": "export", "adapter": child["adapter"], "after": [child["id"]]})
    assert {child["id"], grandchild["id"]}.isdisjoint(api.queue.waiting())
    assert api.http.post(f"/v1/jobs/{parent['id']}/cancel").json()["status"] == "cancelled"
    for job in (child, grandchild):
        # The server's own reconcile() may have been first, and still be at it.
        seen = until(api, job["id"], "failed")
        assert seen["error"]["code"] == "parent_failed"
        assert parent["id"] in str(seen["error"])
    assert post(api, cpt(name))["status"] == "queued"


def test_a_resumed_job_still_waits_for_its_parents(api: Api) -> None:
    parent = post(api, cpt(unique()))["id"]
    child = post(api, cpt(unique(), after=[parent]))["id"]
    api.http.post(f"/v1/jobs/{child}/pause")
    assert api.http.post(f"/v1/jobs/{child}/resume").json()["status"] == "queued"
    assert child not in api.queue.waiting()


def test_a_running_export_cannot_pause(api: Api) -> None:
    adapter(api, name := unique())
    job_id = post(api, {"kind": "export", "adapter": name})["id"]
    start(api, job_id)
    answer = api.http.post(f"/v1/jobs/{job_id}/pause")
    assert (answer.status_code, error_of(answer)["code"]) == (409, "not_pausable")


# Chains


def test_three_posts_at_once_make_a_chain_with_its_lineage(api: Api) -> None:
    first = post(api, cpt(cpt_name := unique(), lora__r=16, lora__train_embeddings=False))
    second = post(api, ift(ift_name := unique(), after=[first["id"]], init={"adapter": cpt_name}))
    third = post(api, {"kind": "export", "adapter": ift_name, "format": "merged_16bit", "after": [second["id"]]})
    assert second["spec"]["lora"]["r"] == 16, "continue trains the parent's matrices, so it has the parent's rank"
    assert second["spec"]["lora"]["train_embeddings"] is False
    base = api.settings.base_model
    assert second["lineage"] == {"base": base, "parent": cpt_name, "jobs": [first["id"]]}
    assert third["lineage"] == {"base": base, "parent": ift_name, "jobs": [first["id"], second["id"]]}
    assert third["adapter"] == ift_name


def test_continue_takes_the_finished_parent_s_lora_and_refuses_another(api: Api) -> None:
    adapter(api, name := unique(), lora__r=4, lora__lora_alpha=8)
    init = {"adapter": name, "mode": "continue"}
    job = post(api, ift(unique(), init=init, lora__lora_dropout=0.0, lora__r=4))
    assert (job["spec"]["lora"]["r"], job["spec"]["lora"]["lora_alpha"]) == (4, 8)
    answer = api.http.post("/v1/jobs", json=ift(unique(), init=init, lora__r=8))
    assert (answer.status_code, error_of(answer)["param"]) == (422, "lora.r")
    stacked = post(api, ift(unique(), init={"adapter": name, "mode": "stack"}, lora__r=8))
    assert stacked["spec"]["lora"]["r"] == 8


def test_a_path_may_begin_with_the_home_folder(api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "set").mkdir()
    adapter(api, name := unique(), model__name=str(tmp_path / "base"))
    post(api, ift(unique(), init={"adapter": name}, model__name="~/base", dataset__path="~/set"))
    for field, path in (("model.name", "~/none"), ("model.name", "~nobody-here/x"), ("dataset.path", "~/none")):
        answer = api.http.post("/v1/jobs", json=cpt(unique(), **{field.replace(".", "__"): path}))
        assert (answer.status_code, error_of(answer)["param"]) == (422, field)


def test_a_checkpoint_can_be_started_from_and_exported(api: Api) -> None:
    job_id = post(api, cpt(name := unique()))["id"]
    run = start(api, job_id)
    checkpoint(api, job_id, 7)
    for ref in (f"{name}@7", f"{job_id}@7"):
        assert post(api, {"kind": "export", "adapter": ref})["lineage"]["parent"] == ref
    assert post(api, ift(unique(), init={"adapter": f"{name}@7"}))["lineage"]["jobs"] == [job_id]
    missing = api.http.post("/v1/jobs", json={"kind": "export", "adapter": f"{name}@8"})
    assert (missing.status_code, error_of(missing)["code"]) == (404, "adapter_not_found")
    listed = api.http.get(f"/v1/jobs/{job_id}/checkpoints").json()["data"]
    assert [(c["step"], c["adapter"], c["eval_loss"]) for c in listed] == [(7, f"{name}@7", 1.9)]
    succeed(api, job_id, run)


def test_a_job_behind_a_failed_one_is_refused(api: Api) -> None:
    parent = post(api, cpt(unique()))["id"]
    fail(api, parent)
    answer = api.http.post("/v1/jobs", json=cpt(unique(), after=[parent]))
    assert (answer.status_code, error_of(answer)["param"], error_of(answer)["code"]) == (
        409,
        "after.0",
        "parent_failed",
    )


# Hub tokens, artifacts, graphs


def test_a_hub_token_is_held_with_the_job_and_shown_nowhere(api: Api) -> None:
    job = post(api, cpt(unique()), X_HF_Token="hf_secret")
    assert api.queue.token(job["id"]) == "hf_secret"
    assert 29 * 86400 < api.queue.redis.ttl(f"lorry:hub-token:{job['id']}") <= 30 * 86400
    text = api.http.get(f"/v1/jobs/{job['id']}").text
    text += api.http.get(f"/v1/jobs/{job['id']}/events", headers={"Accept": "application/json"}).text
    assert "hf_secret" not in text
    api.http.post(f"/v1/jobs/{job['id']}/cancel")
    assert api.queue.token(job["id"]) is None


def test_a_hub_token_is_there_before_its_job(api: Api) -> None:
    """A worker that finds the job in SQL must find its token, too."""
    held: dict[str, str | None] = {}

    def look(session: Session) -> None:
        for row in session.identity_map.values():
            if isinstance(row, JobRow):
                held.setdefault(row.id, api.queue.token(row.id))

    event.listen(Session, "before_commit", look)
    try:
        job = post(api, cpt(unique()), X_HF_Token="hf_secret")
    finally:
        event.remove(Session, "before_commit", look)
    assert held[job["id"]] == "hf_secret"


def test_a_refused_job_s_hub_token_is_forgotten(api: Api) -> None:
    before = set(api.queue.redis.keys("lorry:hub-token:*"))
    answer = api.http.post("/v1/jobs", json=cpt(unique(), model__name="/no/such"), headers={"X-HF-Token": "hf_secret"})
    assert answer.status_code == 422
    assert set(api.queue.redis.keys("lorry:hub-token:*")) == before


@pytest.fixture(scope="module")
def export(api: Api) -> str:
    adapter(api, name := unique())
    job_id = post(api, {"kind": "export", "adapter": name})["id"]
    succeed(api, job_id, artifacts={"model/weights.bin": bytes(range(256)) * 4, "config.json": b"{}"})
    (api.settings.exports_dir / "secret.txt").write_text("not an artifact")
    return str(job_id)


def test_artifacts_are_listed_and_downloaded(api: Api, export: str) -> None:
    listed = api.http.get(f"/v1/jobs/{export}/artifacts").json()
    assert [(a["path"], a["bytes"]) for a in listed["data"]] == [("config.json", 2), ("model/weights.bin", 1024)]
    whole = api.http.get(f"/v1/jobs/{export}/artifacts/model/weights.bin")
    assert whole.content == bytes(range(256)) * 4
    assert whole.headers["etag"] == f'"{listed["data"][1]["sha256"]}"'
    assert whole.headers["accept-ranges"] == "bytes"


@pytest.mark.parametrize(
    ("header", "expected"),
    [("bytes=0-3", range(0, 4)), ("bytes=1000-", range(1000, 1024)), ("bytes=-2", range(1022, 1024))],
)
def test_a_range_gives_that_part(api: Api, export: str, header: str, expected: range) -> None:
    part = api.http.get(f"/v1/jobs/{export}/artifacts/model/weights.bin", headers={"Range": header})
    assert part.status_code == 206
    assert part.content == bytes(i % 256 for i in expected)
    assert part.headers["content-range"] == f"bytes {expected.start}-{expected.stop - 1}/1024"


def test_if_range_gives_the_whole_file_once_it_changed(api: Api, export: str) -> None:
    url = f"/v1/jobs/{export}/artifacts/model/weights.bin"
    head = api.http.head(url)
    assert (head.headers["content-length"], head.content) == ("1024", b"")
    etag = head.headers["etag"]
    assert api.http.get(url, headers={"Range": "bytes=0-3", "If-Range": etag}).status_code == 206
    assert api.http.get(url, headers={"Range": "bytes=0-3", "If-Range": '"other"'}).status_code == 200


def test_a_range_beyond_the_end_is_416_in_our_shape(api: Api, export: str) -> None:
    answer = api.http.get(f"/v1/jobs/{export}/artifacts/config.json", headers={"Range": "bytes=10-20"})
    assert (answer.status_code, error_of(answer)["code"]) == (416, "range_not_satisfiable")
    assert answer.headers["content-range"] == "bytes */2"


@pytest.mark.parametrize(
    "path", ["..%2Fsecret.txt", "..%2F..%2Florry.db", "%2Fetc%2Fpasswd", "model", "no.bin", "a%00b"]
)
def test_only_listed_files_can_be_named(api: Api, export: str, path: str) -> None:
    answer = api.http.get(f"/v1/jobs/{export}/artifacts/{path}")
    assert (answer.status_code, error_of(answer)["code"]) == (404, "artifact_not_found")


@pytest.mark.parametrize(("format", "magic"), [("svg", b"<?xml"), ("png", b"\x89PNG")])
def test_the_losses_of_two_jobs_make_one_graph(api: Api, format: str, magic: bytes) -> None:
    jobs = [post(api, cpt(unique("one"))), post(api, ift(unique("two")))]
    with api.db.write() as session:
        for job in jobs:
            points: list[tuple[str, int, dict[str, Any]]] = [("train", s, {"loss": 3 - s / 10}) for s in range(1, 5)]
            repository.put_metrics(session, job["id"], [*points, ("eval", 4, {"eval_loss": 2.7})])
    ids = ",".join(j["id"] for j in jobs)
    answer = api.http.get(f"/v1/loss.{format}", params={"jobs": ids})
    assert answer.status_code == 200
    assert answer.content.startswith(magic)
    if format == "svg":
        for text in (f"{jobs[0]['adapter']} (cpt) train", f"{jobs[1]['adapter']} (ift) eval", "optimiser step", "loss"):
            assert text in answer.text, "the legend names adapter and kind, the axes what they show"


def test_with_the_queue_away_a_job_is_accepted_and_queued_later(sqlite_url: str, make_settings: Any) -> None:
    from tests.conftest import free_port, serve

    dead = f"redis://127.0.0.1:{free_port()}/0"
    with serve(make_settings(database_url=sqlite_url, redis_url=dead)) as api:
        job = post(api, cpt(unique()))
        assert api.http.get(f"/v1/jobs/{job['id']}").json()["status"] == "queued"
        refused = api.http.post("/v1/jobs", json=cpt(name := unique()), headers={"X-HF-Token": "hf_secret"})
        assert refused.status_code == 503, "the token can be kept nowhere else"
        assert name not in api.http.get("/v1/jobs").text
    with serve(make_settings(database_url=sqlite_url)) as api:
        for _ in range(100):
            if job["id"] in api.queue.waiting():
                break
            threading.Event().wait(0.05)
        assert job["id"] in api.queue.waiting()
