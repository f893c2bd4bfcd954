"""OpenAI's fine-tuning API with the official SDK, over the same jobs."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from service.specs import parse_spec
from tests.conftest import Api
from tests.steps import adapter, checkpoint, cpt, fail, post, start, succeed, unique

ROWS = b"".join(
    json.dumps({"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "yes"}]}).encode() + b"\n"
    for n in range(12)
)  # fmt: skip


@pytest.fixture
def client(api: Api) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{api.url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def file(client: openai.OpenAI) -> str:
    return client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune").id


def base(api: Api) -> str:
    return api.settings.base_model


def test_a_job_is_made_with_the_sdk_and_is_a_native_job(api: Api, client: openai.OpenAI, file: str) -> None:
    held = client.files.create(file=("held.jsonl", ROWS), purpose="fine-tune").id
    job = client.fine_tuning.jobs.create(
        model=base(api),
        training_file=file,
        validation_file=held,
        suffix="support",
        seed=7,
        metadata={"team": "a"},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 12}}},
    )
    assert (job.object, job.status, job.model, job.fine_tuned_model) == ("fine_tuning.job", "queued", base(api), None)
    assert (job.training_file, job.validation_file, job.seed, job.metadata) == (file, held, 7, {"team": "a"})
    assert (job.hyperparameters.n_epochs, job.hyperparameters.batch_size) == (2, 12)
    native = api.http.get(f"/v1/jobs/{job.id}").json()
    assert native["kind"] == "ift"
    assert native["adapter"].startswith("ft-support-")
    spec = native["spec"]
    assert parse_spec(spec).model_dump() == spec  # as a worker reads it
    assert (spec["dataset"]["file_id"], spec["dataset"]["eval_file_id"]) == (file, held)
    assert spec["training"]["train_on_responses_only"] is True
    passes, rows = (spec["training"][f"{n}"] for n in ("gradient_accumulation_steps", "per_device_train_batch_size"))
    assert (passes, rows) == (2, 6)
    assert spec["metadata"] == {"team": "a"}
    assert client.fine_tuning.jobs.retrieve(job.id) == job
    assert api.http.delete(f"/v1/files/{held}").status_code == 409  # the job reads it


def test_what_became_of_a_job_is_told_in_openais_words(api: Api, client: openai.OpenAI, file: str) -> None:
    job = client.fine_tuning.jobs.create(model=base(api), training_file=file)
    run = start(api, job.id)
    checkpoint(api, job.id, 5)
    checkpoint(api, job.id, 10)
    assert client.fine_tuning.jobs.retrieve(job.id).status == "running"
    succeed(api, job.id, run)
    done = client.fine_tuning.jobs.retrieve(job.id)
    name = api.http.get(f"/v1/jobs/{job.id}").json()["adapter"]
    assert (done.status, done.fine_tuned_model) == ("succeeded", name)
    assert done.finished_at is not None
    found = list(client.fine_tuning.jobs.checkpoints.list(job.id, limit=1))  # by pages
    assert [c.step_number for c in found] == [10, 5]
    assert found[0].fine_tuned_model_checkpoint == f"{name}@10"
    assert (found[0].metrics.train_loss, found[0].metrics.valid_loss) == (2.0, 1.9)
    messages = [e.message for e in client.fine_tuning.jobs.list_events(job.id, limit=2)]  # by pages, newest first
    assert messages == [
        "The job is succeeded", "Checkpoint at step 10", "Checkpoint at step 5", "The job is running",
        "The job is preparing", "The job is queued",
    ]  # fmt: skip
    # Trained on, it is continued.
    more = client.fine_tuning.jobs.create(model=name, training_file=file)
    assert more.model == name
    assert api.http.get(f"/v1/jobs/{more.id}").json()["spec"]["init"] == {"adapter": name, "mode": "continue"}


def test_a_failure_says_why(api: Api, client: openai.OpenAI, file: str) -> None:
    job = client.fine_tuning.jobs.create(model=base(api), training_file=file)
    fail(api, job.id, "the card is gone")
    error = client.fine_tuning.jobs.retrieve(job.id).error
    assert error is not None
    assert (error.code, error.message) == ("internal_error", "the card is gone")
    newest = next(iter(client.fine_tuning.jobs.list_events(job.id, limit=1)))
    assert (newest.level, newest.message) == ("error", "The job is failed: the card is gone")


def test_pause_resume_and_cancel(api: Api, client: openai.OpenAI, file: str) -> None:
    job = client.fine_tuning.jobs.create(model=base(api), training_file=file)
    assert client.fine_tuning.jobs.pause(job.id).status == "paused"
    assert client.fine_tuning.jobs.resume(job.id).status == "queued"
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    with pytest.raises(openai.ConflictError):
        client.fine_tuning.jobs.cancel(job.id)


def test_the_list_has_every_training_job_and_narrows_by_metadata(api: Api, client: openai.OpenAI, file: str) -> None:
    mark = unique()
    ours = [
        client.fine_tuning.jobs.create(model=base(api), training_file=file, metadata={"mark": mark}).id
        for _ in range(3)
    ]
    native = str(post(api, cpt(unique()))["id"])
    source = unique()
    adapter(api, source)
    export = str(post(api, {"kind": "export", "adapter": source})["id"])
    seen = [job.id for job in client.fine_tuning.jobs.list(limit=2)]
    assert set(seen) >= {*ours, native}
    assert export not in seen
    assert seen == sorted(seen, reverse=True)
    marked: Any = client.fine_tuning.jobs.list(limit=2, metadata={"mark": mark})
    assert [job.id for job in marked] == ours[::-1]
    with pytest.raises(openai.NotFoundError):
        client.fine_tuning.jobs.retrieve(export)


@pytest.mark.parametrize("key", ['a"b', "a\\b", "a,{b}", "a.b[0]", "$", "'"])
def test_any_key_of_the_metadata_narrows_the_list(api: Api, client: openai.OpenAI, file: str, key: str) -> None:
    value = unique()
    made = client.fine_tuning.jobs.create(model=base(api), training_file=file, metadata={key: value}).id
    found: Any = client.fine_tuning.jobs.list(metadata={key: value})
    assert [job.id for job in found] == [made]
    other: Any = client.fine_tuning.jobs.list(metadata={key: value, "none": "\0"})
    assert list(other) == []


def test_a_request_sent_again_with_its_key_is_the_same_job(api: Api, client: openai.OpenAI, file: str) -> None:
    headers = {"Idempotency-Key": unique()}
    first, second = (
        client.fine_tuning.jobs.create(model=base(api), training_file=file, extra_headers=headers) for _ in range(2)
    )
    assert first.id == second.id
    with pytest.raises(openai.ConflictError):
        client.fine_tuning.jobs.create(model=base(api), training_file=file, seed=1, extra_headers=headers)


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"model": "no model/at all"}, 422, "model"),
        ({"training_file": "file_none"}, 404, "training_file"),
        ({"validation_file": "file_none"}, 404, "validation_file"),
        ({"suffix": "a b"}, 422, "suffix"),
        ({"seed": -1}, 422, "seed"),
        ({"hyperparameters": {"n_epochs": 0}}, 422, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"learning_rate_multiplier": 1e-321}}, 422, "hyperparameters.learning_rate_multiplier"),
        ({"hyperparameters": {"epochs": 1}}, 422, "hyperparameters.epochs"),
        ({"method": {"type": "dpo"}}, 422, "method.type"),
        ({"method": {"type": "supervised"}, "hyperparameters": {}}, 422, "hyperparameters"),
        ({"integrations": [{"type": "wandb"}]}, 422, "integrations"),
        ({"metadata": {"a": "x" * 513}}, 422, "metadata"),
        ({"unknown": 1}, 422, "unknown"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_its_field(
    api: Api, file: str, change: dict[str, Any], status: int, param: str
) -> None:
    answer = api.http.post("/v1/fine_tuning/jobs", json={"model": base(api), "training_file": file, **change})
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["param"] == param
