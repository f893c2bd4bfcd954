"""What passes between a recipe and the task that runs it. No database, no HTTP, no torch."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from service.errors import JobFailure
from service.settings import Settings
from worker.ranks import ALONE, Ranks

Ask = Literal["pause", "cancel", "stop"]
log = logging.getLogger("lorry.worker")


class Progress(Protocol):
    """What a recipe reports and how it learns that it should end. Every call may raise service.jobs.repository.Fenced."""

    def phase(self, name: str) -> None:
        """A new phase has begun: data, model, training, saving, verifying, …"""

    def log(self, message: str) -> None: ...

    def started(self) -> None:
        """The work proper begins: preparing → running."""

    def steps(self, values: dict[str, Any]) -> None:
        """step, total_steps, epoch, tokens, tokens_per_second, eta_seconds."""

    def metrics(self, split: Literal["train", "eval"], step: int, point: dict[str, Any]) -> None: ...

    def resumed(self, step: int) -> None:
        """Points beyond `step` are void: they will be written again."""

    def checkpoints(self, present: dict[int, dict[str, Any]]) -> None:
        """The checkpoints on disk now, by step: path, loss, eval_loss, bytes. Those not in it are gone."""

    def record(self, values: dict[str, Any]) -> None:
        """Add to the run's record."""

    def asked(self) -> Ask | None:
        """What was asked of this run, if anything: pause or cancel by a client, stop by a worker that shuts down."""


class Silent:
    """A Progress that nobody listens to but the log."""

    def phase(self, name: str) -> None:
        log.info("phase %s", name)

    def log(self, message: str) -> None:
        log.info("%s", message)

    def started(self) -> None: ...

    def steps(self, values: dict[str, Any]) -> None: ...

    def metrics(self, split: str, step: int, point: dict[str, Any]) -> None: ...

    def resumed(self, step: int) -> None: ...

    def checkpoints(self, present: dict[int, dict[str, Any]]) -> None: ...

    def record(self, values: dict[str, Any]) -> None: ...

    def asked(self) -> Ask | None:
        return None


class Interrupted(Exception):
    """The run was asked to end before training began, or in a phase that has no checkpoint."""

    def __init__(self, ask: Ask) -> None:
        super().__init__(ask)
        self.ask = ask


@dataclass(frozen=True)
class Paths:
    """Where a recipe reads and writes."""

    run_dir: Path  # checkpoints/, tensorboard/
    out_dir: Path  # the finished adapter or export; made whole or not at all
    base: str  # folder or hub id of the base model
    file: Path | None = None  # the upload
    eval_file: Path | None = None  # the upload with the evaluation rows
    parent: Path | None = None  # adapter folder that init or an export refers to


@dataclass(frozen=True)
class Context:
    """What a recipe was given, apart from its spec."""

    paths: Paths
    progress: Progress
    settings: Settings
    about: dict[str, Any]  # written beside the weights as lorry_adapter.json
    token: str | None = field(repr=False)  # opens gated hub repositories, and those that are pushed to
    ranks: Ranks = ALONE  # who trains together

    @property
    def checkpoints(self) -> Path:
        return self.paths.run_dir / "checkpoints"

    @property
    def hub(self) -> dict[str, Any]:
        return {"token": self.token, "trust_remote_code": self.settings.trust_remote_code}


@dataclass
class Outcome:
    """How a recipe ended: `done` with a result, or as it was asked to."""

    ended: Literal["done", "pause", "cancel", "stop"]
    result: dict[str, Any] = field(default_factory=dict)
    adapter: dict[str, Any] = field(default_factory=dict)  # columns of the adapter's row
    artifacts: list[dict[str, Any]] = field(default_factory=list)  # path, bytes, sha256
    failure: JobFailure | None = None  # what failed once all the above was good: it is kept, and the job fails


def check(progress: Progress) -> None:
    """Raise Interrupted if the run was asked to end. For phases without a checkpoint of their own."""
    ask = progress.asked()
    if ask:
        raise Interrupted(ask)
