"""Checks at the door: what can be known to be wrong about a spec before a job is made of it.

Each refusal has a status, a code and the field at fault. What only the worker can know (a hub id that does not exist,
a column that a row lacks) ends the job as failed instead.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from sqlalchemy import select
from sqlalchemy.orm import Session

from service.adapters.service import checkpoint_of
from service.errors import Conflict, Invalid, LorryError, NotFound
from service.files import repository as files
from service.ids import is_id
from service.jobs import repository
from service.jobs.states import FINAL
from service.models import AdapterRow, JobRow
from service.settings import Settings
from service.specs import CptSpec, ExportSpec, IftSpec, LoraSpec, TrainSpec
from service.templates import compile_chat, fields_of

AnyJobSpec = CptSpec | IftSpec | ExportSpec
TSpec = TypeVar("TSpec", bound=TrainSpec)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass
class Admitted:
    """A spec that passed: with its defaults from the server and its parent filled in."""

    spec: AnyJobSpec
    base: str
    lineage: dict[str, Any] = field(default_factory=dict)


def admit(session: Session, settings: Settings, spec: AnyJobSpec) -> Admitted:
    """Check a spec against what there is. Call inside the transaction that stores the job. Raises LorryError."""
    after = _parents(session, spec.after)
    if isinstance(spec, ExportSpec):
        return _admit_export(session, spec, after)
    _check_model(settings, spec)
    spec = _with_base(settings, spec)
    _check_data(session, spec)
    parent = None
    if isinstance(spec, IftSpec) and spec.init:
        parent = _find(session, spec.init.adapter, after, "init.adapter")
        spec = _continue(spec, parent)
    _check_name(session, settings, spec)
    base = spec.model.name or settings.base_model
    return Admitted(spec, base, _lineage(base, parent))


# Parents


def _parents(session: Session, ids: list[str]) -> dict[str, JobRow]:
    rows: dict[str, JobRow] = {}
    for number, job_id in enumerate(ids):
        row = repository.get(session, job_id) if is_id(job_id, "job") else None
        if row is None:
            raise NotFound(f"after.{number}: no job {job_id!r}", param=f"after.{number}", code="job_not_found")
        if row.status in ("failed", "cancelled"):
            message = f"after.{number}: job {job_id} was {row.status}, so this one could never start"
            raise Conflict(message, param=f"after.{number}", code="parent_failed")
        rows[job_id] = row
    return rows


@dataclass
class Parent:
    """The adapter a job starts from, whether it is finished or to be made by a job in `after`."""

    ref: str
    base: str
    revision: str | None
    job: JobRow
    lora: dict[str, Any]


def _find(session: Session, ref: str, after: dict[str, JobRow], param: str) -> Parent:
    name, at, step = ref.partition("@")
    by_job = is_id(name, "job")
    # Held, so that the adapter (with its checkpoints) is neither deleted nor renamed before this job is stored.
    row = session.scalar(
        select(AdapterRow)
        .where(AdapterRow.job_id == name if by_job else AdapterRow.name == name)
        .with_for_update(read=True)
    )
    job = repository.get(session, row.job_id) if row else repository.get(session, name) if by_job else None
    if job is None or job.kind == "export" or (by_job and not at):
        raise NotFound(f"{param}: no adapter {name!r}", param=param, code="adapter_not_found")
    awaited = job.id in after and job.status not in FINAL
    if at and not awaited:
        try:
            checkpoint_of(session, job, name, step, hold=True)
        except LorryError as error:
            raise NotFound(f"{param}: {error.message}", param=param, code=error.code) from error
    elif not at and not awaited and not (row and row.ready):
        message = f"{param}: adapter {name!r} is still being made; put its job, {job.id}, into `after`"
        raise NotFound(message, param=param, code="adapter_not_found")
    spec = job.spec
    # A finished adapter's own configuration outweighs its job's spec: after stack, its rank is another.
    lora = {**spec["lora"], **(row.config if row and row.ready else {})}
    return Parent(ref, row.base if row else spec["model"]["name"], spec["model"]["revision"], job, lora)


def _lineage(base: str | None, parent: Parent | None) -> dict[str, Any]:
    if parent is None:
        return {"base": base, "parent": None, "jobs": []}
    return {"base": base, "parent": parent.ref, "jobs": [*parent.job.lineage.get("jobs", []), parent.job.id]}


def _continue(spec: IftSpec, parent: Parent) -> IftSpec:
    """Check the base against the parent's, and take the parent's LoRA where the same matrices are trained on."""
    assert spec.init is not None
    own = spec.model.name or ""
    if not _same_base(own, parent.base):
        message = f"init.adapter: {parent.ref!r} was trained on {parent.base!r}, this job's base is {own!r}"
        raise Conflict(message, param="init.adapter", code="base_mismatch")
    if spec.model.revision not in (None, parent.revision):
        message = (
            f"init.adapter: {parent.ref!r} was trained on revision {parent.revision!r} of {own!r}, "
            f"this job names revision {spec.model.revision!r}"
        )
        raise Conflict(message, param="init.adapter", code="base_mismatch")
    model = spec.model.model_copy(update={"revision": parent.revision})
    if spec.init.mode != "continue":
        return spec.model_copy(update={"model": model})
    theirs = {k: v for k, v in parent.lora.items() if k in LoraSpec.model_fields and k != "loftq_config"}
    if "lora" in spec.model_fields_set:
        for name in sorted(spec.lora.model_fields_set & theirs.keys()):
            value = getattr(spec.lora, name)
            if _comparable(value) != _comparable(theirs[name]):
                message = (
                    f"lora.{name}: init.mode 'continue' trains {parent.ref!r}'s own matrices on, whose {name} is "
                    f"{theirs[name]!r}, not {value!r}; leave it out, or use 'stack' or 'merge'"
                )
                raise Invalid(message, param=f"lora.{name}", code="lora_mismatch")
    try:
        lora = LoraSpec.model_validate({**spec.lora.model_dump(), **theirs, "loftq_config": None})
    except ValidationError as error:  # e.g. stacked beyond the largest rank a spec may have
        message = f"init.adapter: {parent.ref!r} cannot be continued: {error.errors()[0]['msg']}"
        raise Invalid(message, param="init.adapter", code="lora_mismatch") from error
    return spec.model_copy(update={"model": model, "lora": lora})


def _comparable(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) else value


def _same_base(one: str, other: str) -> bool:
    return one == other or (_is_path(one) and _is_path(other) and _real(one) == _real(other))


# Export


def _admit_export(session: Session, spec: ExportSpec, after: dict[str, JobRow]) -> Admitted:
    if spec.base is not None:
        _check_model_name(spec.base, "base")
    parent = _find(session, spec.adapter, after, "adapter")
    return Admitted(spec, parent.base, _lineage(parent.base, parent))


def _real(path: str) -> str:
    return os.path.realpath(os.path.expanduser(path))


# Model, data, name


def _is_path(name: str) -> bool:
    return name.startswith(("/", "./", "../", "~"))


def _check_model(settings: Settings, spec: TrainSpec) -> None:
    name = spec.model.name
    if name is not None and name != settings.base_model:
        _check_model_name(name, "model.name")


def _check_model_name(name: str, param: str) -> None:
    folder = Path(os.path.expanduser(name))  # as the worker does
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            message = f"{param}: the folder {name!r} is no transformers model: it has no config.json"
            raise Invalid(message, param=param, code="model_not_found")
    elif _is_path(name) or not _HUB_ID.fullmatch(name):
        message = f"{param}: {name!r} is neither a folder on the server nor a hub id (owner/name)"
        raise Invalid(message, param=param, code="model_not_found")


def _with_base(settings: Settings, spec: TSpec) -> TSpec:
    if spec.model.name is not None:
        return spec
    return spec.model_copy(update={"model": spec.model.model_copy(update={"name": settings.base_model})})


def _check_data(session: Session, spec: TrainSpec) -> None:
    data = spec.dataset
    if data.file_id is not None:
        files.hold(session, data.file_id, param="dataset.file_id")
    if data.eval_file_id is not None:
        files.hold(session, data.eval_file_id, param="dataset.eval_file_id")
    if data.path is not None and _is_path(data.path) and not os.path.exists(os.path.expanduser(data.path)):
        message = f"dataset.path: {data.path!r} does not exist on the server"
        raise Invalid(message, param="dataset.path", code="dataset_not_found")
    for name in ("prompt", "response"):
        text = getattr(data.template, name)
        if text is None:
            continue
        param = f"dataset.template.{name}"
        try:
            fields = fields_of(text)
        except ValueError as error:
            raise Invalid(f"{param}: {error}", param=param, code="invalid_template") from error
        if not fields:
            message = f"{param}: names no column; write {{column}} where a row's text belongs"
            raise Invalid(message, param=param, code="invalid_template")
    chat = data.template.chat_template
    if chat is not None and ("{%" in chat or "{{" in chat):
        try:
            compile_chat(chat)
        except ValueError as error:
            param = "dataset.template.chat_template"
            raise Invalid(f"{param}: {error}", param=param, code="invalid_template") from error


def _check_name(session: Session, settings: Settings, spec: TrainSpec) -> None:
    name = spec.adapter
    if name in (settings.base_model, spec.model.name):
        raise Conflict(f"adapter: {name!r} is the base model's name", param="adapter", code="adapter_exists")
    if is_id(name, "job"):
        raise Invalid(
            "adapter: a name in the form of a job id would be taken for that job's checkpoints", param="adapter"
        )
    if session.get(AdapterRow, name) is not None:
        raise name_taken(name)


def name_taken(name: str, param: str = "adapter") -> Conflict:
    message = f"{param}: an adapter {name!r} exists or is being made; choose another name or delete it"
    return Conflict(message, param=param, code="adapter_exists")


def _unsupported(param: str, message: str) -> Invalid:
    return Invalid(f"{param}: {message}", param=param, code="not_supported")
