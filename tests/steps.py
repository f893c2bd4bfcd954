"""What a client and a worker do, in few words: specs, and a job's moves through the repository as a worker makes them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from sqlalchemy import update

from service.ids import new_id
from service.jobs import repository
from service.models import AdapterRow, ArtifactRow, CheckpointRow, JobRow
from tests.conftest import Api

TEMPLATE = {"kind": "prompt", "prompt": "{text}", "eos": "</s>", "stop": ["</s>"]}


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with dotted paths set: {"lora.r": 8}; a value of ... removes the field."""
    out: dict[str, Any] = json.loads(json.dumps(base))
    for path, value in changes.items():
        *parents, last = path.split(".")
        here = out
        for name in parents:
            here = here.setdefault(name, {})
        if value is ...:
            here.pop(last, None)
        else:
            here[last] = value
    return out


def cpt(adapter: str, /, **changes: Any) -> dict[str, Any]:
    """A small cpt spec; keyword arguments set dotted paths, with __ for the dot."""
    base = {"kind": "cpt", "adapter": adapter, "dataset": {"path": "org/set", "template": {"prompt": "{text}"}}}
    return merged(base, {k.replace("__", "."): v for k, v in changes.items()})


def ift(adapter: str, /, **changes: Any) -> dict[str, Any]:
    template = {"prompt": "Q: {q}\nA: ", "response": "{a}"}
    base = {"kind": "ift", "adapter": adapter, "dataset": {"path": "org/set", "template": template}}
    return merged(base, {k.replace("__", "."): v for k, v in changes.items()})


def unique(prefix: str = "a") -> str:
    return new_id(prefix).replace("_", "-")


def post(api: Api, spec: dict[str, Any], **headers: str) -> dict[str, Any]:
    """Make a job; asserts that it was accepted."""
    answer = api.http.post("/v1/jobs", json=spec, headers={k.replace("_", "-"): v for k, v in headers.items()})
    assert answer.status_code == 202, answer.text
    body: dict[str, Any] = answer.json()
    return body


def start(api: Api, job_id: str) -> str:
    """As a worker: claim the job and begin its steps; returns the run's id."""
    run_id = new_id("run")
    with api.db.write() as session:
        assert repository.claim(session, job_id, run_id, "test-worker") is not None
        assert repository.transition(session, job_id, ["preparing"], "running", run_id=run_id)
    return run_id


def folder(path: Path, template: dict[str, Any] = TEMPLATE) -> Path:
    """A folder as a worker leaves it, as far as the API looks into it."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "lorry_template.json").write_text(json.dumps(template))
    return path


def checkpoint(api: Api, job_id: str, step: int) -> Path:
    path = folder(api.settings.job_dir(job_id) / "checkpoints" / f"checkpoint-{step}")
    row = CheckpointRow(
        job_id=job_id, step=step, path=str(path), loss=2.0, eval_loss=1.9, bytes=10, created_at=time.time()
    )
    with api.db.write() as session:
        session.merge(row)
        data = {"step": step, "loss": 2.0, "eval_loss": 1.9, "adapter": f"{job_id}@{step}"}
        repository.add_event(session, job_id, "checkpoint", data)
    return path


def succeed(api: Api, job_id: str, run_id: str | None = None, *, artifacts: dict[str, bytes] | None = None) -> None:
    """As a worker: finish the job, with its adapter or its artifacts."""
    import hashlib

    run_id = run_id or start(api, job_id)
    with api.db.write() as session:
        row = session.get_one(JobRow, job_id)
        assert repository.transition(
            session, job_id, ["running"], "succeeded", run_id=run_id, result={"eval_loss": 1.5}
        )
        if row.kind != "export":
            path = folder(api.settings.adapters_dir / job_id)
            lora = row.spec["lora"]
            keys = ("r", "lora_alpha", "use_rslora", "target_modules", "train_embeddings")
            values = {
                "ready": True, "path": str(path), "step": 10, "bytes": 100, "eval_loss": 1.5, "template": TEMPLATE,
                "config": {k: lora[k] for k in keys},
            }  # fmt: skip
            session.execute(update(AdapterRow).where(AdapterRow.job_id == job_id).values(**values))
        for name, content in (artifacts or {}).items():
            target = api.settings.exports_dir / job_id / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
            digest = hashlib.sha256(content).hexdigest()
            session.add(ArtifactRow(job_id=job_id, path=name, bytes=len(content), sha256=digest))


def fail(api: Api, job_id: str, message: str = "broken") -> None:
    run_id = start(api, job_id)
    error = {"code": "internal_error", "message": message, "rows": []}
    with api.db.write() as session:
        assert repository.transition(session, job_id, ["running"], "failed", run_id=run_id, reason=message, error=error)


def adapter(api: Api, name: str, **changes: Any) -> str:
    """A finished adapter; returns its job's id."""
    job = post(api, cpt(name, **changes))
    succeed(api, job["id"])
    return str(job["id"])


def error_of(answer: Any) -> dict[str, Any]:
    """The error of an answer; asserts its shape."""
    body = answer.json()
    assert set(body) == {"error"}, body
    assert {"type", "message", "param", "code"} <= set(body["error"]), body
    error: dict[str, Any] = body["error"]
    return error
