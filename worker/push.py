"""push_to_hub in a job: asked about before the work, done after it, and what was made is kept if it fails."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from service.errors import JobFailure
from service.job_spec import HubSpec
from service.jobs.repository import Fenced
from service.specs import CptSpec, IftSpec
from service.templates import StoredTemplate
from worker.files import list_files
from worker.hub import preflight, push
from worker.outcome import Context, Interrupted, Progress

log = logging.getLogger("lorry.worker")


def prepare(spec: HubSpec, token: str | None, progress: Progress, run_dir: Path) -> None:
    """Fail before hours of work whose result the hub would not take. Raises as `preflight`.

    A training that is under way already goes on: what it has done outweighs a token that was lost with the queue server
    or a hub that is away just now, and its adapter is kept in any case.
    """
    try:
        preflight(spec, token, progress)
    except JobFailure as failure:
        if not any((run_dir / "checkpoints").glob("checkpoint-*")):
            raise
        progress.log(f"{failure.message}. The training goes on from its checkpoint; the push will be tried at its end")


def push_result(folder: Path, spec: HubSpec, context: Context, result: dict[str, Any], kept: str) -> JobFailure | None:
    """Push what a job has made and checked, as the last thing it does.

    Puts `push` into `result`, or returns the failure that the job ends with: what was made is good all the same, and
    `kept` tells the client where it is. Raises Interrupted and Fenced.
    """
    try:
        result["push"] = push(folder, spec, context.token, context.progress)
    except (Interrupted, Fenced):
        raise
    except Exception as error:  # whatever it is, it must not cost what was made
        return _failed(error, kept)
    return None


def push_adapter(adapter: Path, spec: CptSpec | IftSpec, context: Context, result: dict[str, Any]) -> JobFailure | None:
    """Push the adapter of a finished training as an export of format `lora` would; else as `push_result`."""
    from transformers import AutoTokenizer

    from worker.export.folder import write_card, write_lora, write_manifest, write_template

    assert spec.push_to_hub is not None
    about = json.loads((adapter / "lorry_adapter.json").read_text("utf-8"))
    stored = StoredTemplate.model_validate_json((adapter / "lorry_template.json").read_text("utf-8"))
    again = {"kind": "export", "adapter": spec.adapter, "format": "lora", "push_to_hub": spec.push_to_hub.model_dump()}
    kept = f"The adapter {spec.adapter} is kept and can be served; POST /v1/jobs {json.dumps(again)} pushes it again"
    folder = context.paths.run_dir / "push"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
        write_lora(adapter, about, folder)
        write_template(adapter, stored, AutoTokenizer.from_pretrained(adapter), folder)
        write_card("lora", spec.adapter, about, folder)
        write_manifest(folder, "lora", spec.adapter, about, stored, list_files(folder), result["verification"])
        return push_result(folder, spec.push_to_hub, context, result, kept)
    except (Interrupted, Fenced):
        raise
    except Exception as error:
        return _failed(error, kept)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _failed(error: Exception, kept: str) -> JobFailure:
    if isinstance(error, JobFailure):
        return JobFailure("hub_push_failed", f"{error.message}. {kept}")
    log.error("the push failed", exc_info=error)
    return JobFailure("hub_push_failed", f"push_to_hub: {type(error).__name__}: {error}. {kept}")
