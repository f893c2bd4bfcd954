"""What a job would do: checked at the door as a job is, then looked at by a child process that has the training packages.

The child (worker/dry_run.py) is this host's; it lives as long as the request, within a limit. Nothing is stored.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import logging
import os
import signal
import statistics
import sys
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.adapters.service import resolve
from service.db import Database
from service.errors import LorryError, NotFound, Unavailable
from service.files import repository as files
from service.files.service import file_key
from service.jobs import repository
from service.jobs.door import Admitted, AnyJobSpec, admit
from service.jobs.dry_run_schemas import DryRun, Time
from service.jobs.schemas import Lineage
from service.logs import redact
from service.models import JobRow
from service.settings import Settings
from service.specs import ExportSpec, IftSpec
from service.storage import StorageUnavailable, open_storage

log = logging.getLogger("lorry.dry_run")
_PACKAGES = ("worker", "torch", "transformers", "datasets", "peft")
_ROOT = Path(__file__).resolve().parents[2]
_RUNS = 5  # of which the speed is the median, newest first
_LOOK = 50  # jobs looked at for them
# Of the settings, what the child needs. It gets no key, no database and no queue.
_SETTINGS = ("data_dir", "storage_url", "storage_options", "cache_bytes", "token_cache_bytes", "base_model",
             "trust_remote_code", "llama_cpp_dir", "torch_threads", "train_memory_fraction")  # fmt: skip


class DryRuns:
    """Those of one API process: at most LORRY_DRY_RUNS at once. Belongs to the app's event loop."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.running = 0

    async def report(self, db: Database, spec: AnyJobSpec, token: str | None) -> DryRun:
        """The report of a spec. Raises what POST /v1/jobs would, and Unavailable. Cancelled, it ends the child."""
        admitted, request, past = await asyncio.to_thread(_look_up, db, self.settings, spec)
        self._check_packages()
        if self.running >= self.settings.dry_runs:
            message = f"{self.running} dry runs are under way, as many as LORRY_DRY_RUNS allows; try again"
            raise Unavailable(message, code="dry_runs_busy")
        self.running += 1
        try:
            found = await self._child(request, token)
        finally:
            self.running -= 1
        error = found["error"]
        if error is not None and error["code"] == "storage_unavailable":
            raise StorageUnavailable(error["message"])
        spec = admitted.spec
        return DryRun(
            ok=error is None,
            kind=spec.kind,
            adapter=spec.adapter,
            spec=spec.model_dump(mode="json"),
            lineage=Lineage(**admitted.lineage),
            time=None if isinstance(spec, ExportSpec) else _time(found.get("steps"), past),
            **found,
        )

    def _check_packages(self) -> None:
        if self.settings.dry_runs == 0:
            raise Unavailable("dry runs are off on this API (LORRY_DRY_RUNS)", code="dry_run_unavailable")
        missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
        if missing:
            message = (
                f"a dry run reads data and model with the training packages, and this API's host has no {', '.join(missing)}; "
                "ask an API on a host of a worker (`lorry api` there, on the same database), or send the job itself"
            )
            raise Unavailable(message, code="dry_run_unavailable")

    async def _child(self, request: dict[str, Any], token: str | None) -> dict[str, Any]:
        """Run the child. Raises Unavailable if it takes too long, and LorryError if it dies."""
        env = {name: value for name, value in os.environ.items() if not name.startswith("LORRY_")}
        env["PYTHONPATH"] = os.pathsep.join([str(_ROOT), *filter(None, [env.get("PYTHONPATH")])])
        if token:
            env["HF_TOKEN"] = token
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", "worker.dry_run",
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            env=env, start_new_session=True,
        )  # fmt: skip
        try:
            async with asyncio.timeout(self.settings.dry_run_seconds):
                out, err = await child.communicate(json.dumps(request).encode())
        except TimeoutError:
            message = f"the dry run took longer than {self.settings.dry_run_seconds:g} s (LORRY_DRY_RUN_SECONDS)"
            raise Unavailable(message, code="dry_run_timeout") from None
        finally:
            if child.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                await child.wait()
        if child.returncode != 0:
            lines = redact(err.decode(errors="replace").strip()).splitlines()
            log.error("a dry run's process ended with %s: %s", child.returncode, "\n".join(lines[-20:]))
            raise LorryError("the dry run's process died; the API's log has its last words")
        report: dict[str, Any] = json.loads(out)
        return report


def _look_up(db: Database, settings: Settings, spec: AnyJobSpec) -> tuple[Admitted, dict[str, Any], dict[str, Any]]:
    """The admitted spec, what the child is told, and what past runs say. Raises what POST /v1/jobs would."""
    storage = open_storage(settings)
    with db.read() as session:  # nothing is taken: the locks that admit() asks for end with the session
        admitted = admit(session, settings, spec)
        spec = admitted.spec
        parent = awaits = None
        ref = spec.adapter if isinstance(spec, ExportSpec) else None
        if isinstance(spec, IftSpec) and spec.init:
            ref = spec.init.adapter
        if ref is not None:
            try:
                parent = str(resolve(session, storage, ref).path)
            except NotFound:  # admitted all the same: a job in `after` will make it
                awaits = ref
        keys = {}
        for name in ("file_id", "eval_file_id"):
            file_id = None if isinstance(spec, ExportSpec) else getattr(spec.dataset, name)
            row = files.require(session, file_id, param=f"dataset.{name}") if file_id is not None else None
            keys[name] = file_key(row) if row is not None else None
        past = {} if isinstance(spec, ExportSpec) else _past(session, admitted.base, spec.model.load_in_4bit)
    told = settings.model_dump(mode="json", include=set(_SETTINGS))
    request = {
        "spec": spec.model_dump(mode="json"),
        "settings": {**told, "data_dir": str(settings.data_dir.absolute())},
        "base": admitted.base,
        "file": keys["file_id"],
        "eval_file": keys["eval_file_id"],
        "parent": parent,
        "awaits": awaits,
        "device": past.get("device"),
    }
    return admitted, request, past


def _past(session: Session, base: str, four_bit: bool) -> dict[str, Any]:
    """`device` of the newest run on a base, and the `speeds` (tokens/s) of the newest runs on it and that device."""
    model = JobRow.spec["model"]
    query = select(JobRow).where(JobRow.kind.in_(("cpt", "ift")), model["name"].as_string() == base)
    device: dict[str, Any] | None = None
    speeds: list[float] = []
    for job in session.scalars(query.order_by(JobRow.id.desc()).limit(_LOOK)):
        told = [run.record["device"] for run in repository.runs(session, job.id) if run.record.get("device")]
        if not told or (device is not None and _which(told[-1]) != _which(device)):
            continue
        device = device or told[-1]
        points = [p.get("tokens_per_second") for p in repository.metrics(session, job.id)["train"]]
        measured = [speed for speed in points if speed]
        if measured and job.spec["model"]["load_in_4bit"] == four_bit and len(speeds) < _RUNS:
            speeds.append(statistics.median(measured))
    return {"device": device, "speeds": speeds} if device else {}


def _which(device: dict[str, Any]) -> tuple[Any, ...]:
    return device.get("type"), device.get("name"), device.get("threads")


def _time(steps: dict[str, Any] | None, past: dict[str, Any]) -> Time:
    speeds = past.get("speeds") or []
    name = (past.get("device") or {}).get("name")
    if not speeds:
        return Time(runs=0, device=name, why="no run of this installation on this base has told its speed yet")
    speed = statistics.median(speeds)
    if steps is None:
        return Time(tokens_per_second=round(speed, 1), runs=len(speeds), device=name, why="the data could not be read")
    return Time(
        seconds=round(steps["tokens"] / speed, 1), tokens_per_second=round(speed, 1), runs=len(speeds), device=name
    )
