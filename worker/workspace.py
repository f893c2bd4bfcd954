"""What passes between a run's folder on this machine and the data root. With a local root it is one and the same place.

With an object store the run works in its own folder here: what an earlier run stored is fetched first, each checkpoint is
stored before its row is written, the adapter or export before the job's outcome is, and nothing stays behind but a cache.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

from service.errors import JobFailure
from service.models import CheckpointRow
from service.settings import Settings
from service.storage import Storage, StorageUnavailable
from worker.outcome import Outcome

log = logging.getLogger("lorry.worker")


class Workspace(ExitStack):
    """A run's folder and the data root. What the run uses of the latter stays on this machine until the block's end."""

    def __init__(self, storage: Storage, settings: Settings, job_id: str, run_id: str) -> None:
        super().__init__()
        self.storage, self.job_id, self.run_id = storage, job_id, run_id
        self.run_dir = settings.job_dir(job_id).absolute()
        self.exports_dir = settings.exports_dir.absolute()
        self._stored: dict[int, tuple[int, str]] = {}  # step → (time of the folder, path in its row)

    def use(self, where: str | Path | None, code: str, message: str) -> Path | None:
        """A thing on this machine. Raises JobFailure if it is gone, and StorageUnavailable."""
        try:
            return self.enter_context(self.storage.using(where)) if where is not None else None
        except FileNotFoundError as error:
            raise JobFailure(code, f"{message}: {error}") from error

    def take_up(self, rows: Iterable[CheckpointRow]) -> None:
        """Have the checkpoints that the rows name in the run's folder, and no others.

        Raises FileNotFoundError and StorageUnavailable.
        """
        if not self.storage.remote:
            return
        folder = self.run_dir / "checkpoints"
        shutil.rmtree(folder, ignore_errors=True)  # of another run that was here: those stored are fetched again
        for row in rows:
            target = folder / f"checkpoint-{row.step}"
            folder.mkdir(parents=True, exist_ok=True)
            self.storage.copy(row.path, target)
            self._stored[row.step] = (target.stat().st_mtime_ns, row.path)

    def keep_checkpoint(self, step: int, path: Path) -> str:
        """What a checkpoint's row is to say, once it is stored. Raises StorageUnavailable."""
        if not self.storage.remote:
            return str(path)
        time = path.stat().st_mtime_ns
        known = self._stored.get(step)
        if known is None or known[0] != time:
            key = self.storage.own_key(f"jobs/{self.job_id}/checkpoints/{path.name}", self.run_id)
            self._stored[step] = time, self.storage.store(path, key, move=False)
        return self._stored[step][1]

    def drop_checkpoint(self, path: str) -> None:
        """One that has no row any more. With a local root the trainer has removed it."""
        if self.storage.remote:
            try:
                self.storage.remove(path)
            except StorageUnavailable as error:  # `lorry prune` finds it
                log.warning("%s", error)

    def keep_result(self, outcome: Outcome, out_dir: Path, kind: str) -> None:
        """Store what a recipe has made, an adapter or an export, and set its path. Raises StorageUnavailable."""
        if outcome.ended != "done":
            return
        if kind != "export":
            outcome.adapter["path"] = self.storage.store(out_dir, f"adapters/{out_dir.name}")
        elif outcome.artifacts:
            self.storage.store(out_dir, self.storage.own_key(f"exports/{self.job_id}", self.run_id), apart=True)

    def leave(self) -> None:
        """Store log and TensorBoard files, and a refused export, and clear the folder. What cannot be stored stays here."""
        if not self.storage.remote:
            return
        try:
            refused = self.exports_dir / f"{self.job_id}.rejected"
            if refused.is_dir():
                self.storage.store(refused, f"exports/{refused.name}", apart=True)
            series = self.run_dir / "tensorboard"
            for path in sorted(p for p in series.rglob("*") if p.is_file()):
                self.storage.store(path, f"jobs/{self.job_id}/{path.relative_to(self.run_dir).as_posix()}", move=False)
            text = self.run_dir / "log.txt"
            if text.is_file():
                self.storage.store(text, self.storage.own_key(f"jobs/{self.job_id}/log.txt", self.run_id), move=False)
        except (StorageUnavailable, OSError) as error:
            log.warning("what the run leaves stays on this host: %s", error)
            return
        shutil.rmtree(self.run_dir, ignore_errors=True)
