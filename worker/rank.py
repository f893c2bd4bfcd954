"""`python -m worker.rank`: one of the processes that worker/launch.py starts for a job on several devices."""

from __future__ import annotations

import ctypes
import gc
import importlib
import logging
import os
import signal
import sys
import traceback
from multiprocessing.connection import Client, Connection
from typing import Any

from service.jobs.repository import Fenced
from service.logs import hide
from service.specs import parse_spec
from worker.launch import PARENT, SOCKET, Ended, Task
from worker.outcome import Context, Interrupted, Silent
from worker.tasks import RECIPES, classify, limit_gpu, prepare_process

log = logging.getLogger("lorry.worker")
_TORCHRUN = (
    "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE",
    "ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME",
)  # fmt: skip


class Remote:
    """Rank 0's Progress: the job's process does what is called here."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            self.connection.send((name, arguments))
            value, ended = self.connection.recv()
            if ended is not None:
                raise Fenced if ended.fenced else ended.failure
            return value

        return call


def main() -> None:
    """Ask for the task, do this rank's part of it, say how it ended. Exit status 0 if the recipe came to an end."""
    rank, size, host, port = _identity()
    with Client(os.environ.pop(SOCKET), "AF_UNIX") as connection:
        connection.send(rank)
        task: Task = connection.recv()
        try:
            outcome = _run(task, connection, rank, size, host, port)
            ended = Ended(outcome=outcome if rank == 0 else None)
        except Interrupted as interrupted:
            ended = Ended(ask=interrupted.ask)
        except Fenced:
            ended = Ended(fenced=True)
        except Exception as error:
            traceback.print_exc()
            ended = Ended(failure=classify(error))
        connection.send(ended)
        connection.recv()
    if ended.ask or ended.fenced or ended.failure:
        sys.exit(1)  # at which torchrun ends the others, which may be waiting for this one


def _identity() -> tuple[int, int, str, int]:
    """Rank, size and the store's address, as torchrun says them. Other libraries are not to find them: to each of them
    this is the only process, with one device."""
    values = {name: os.environ.pop(name, "") for name in _TORCHRUN}
    for name in [n for n in os.environ if n.startswith("TORCHELASTIC_")]:
        del os.environ[name]
    if sys.platform == "linux":  # torchrun gives each rank a session of its own: no signal to a group reaches it
        parent = int(os.environ.pop(PARENT))
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            sys.exit("the job's process is gone")
    return int(values["RANK"]), int(values["WORLD_SIZE"]), values["MASTER_ADDR"], int(values["MASTER_PORT"])


def _run(task: Task, connection: Connection, rank: int, size: int, host: str, port: int) -> Any:
    device = task.devices[rank]
    os.environ["CUDA_VISIBLE_DEVICES"] = "" if device == "cpu" else device
    if rank:  # Unsloth writes Python modules there
        os.environ["UNSLOTH_COMPILE_LOCATION"] = str(
            task.settings.data_dir.absolute() / f"unsloth_compiled_cache.{rank}"
        )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    hide(task.token)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # what is agreed on stays on this host
    prepare_process(task.settings)
    spec = parse_spec(task.spec)
    if spec.kind != "export":
        importlib.import_module("unsloth")  # before transformers, trl and peft, which it patches
    limit_gpu(task.settings)
    from worker.distributed import Group

    progress: Any = Remote(connection) if rank == 0 else Silent()  # what the others are told is rank 0's to report
    context = Context(
        paths=task.paths,
        progress=progress,
        settings=task.settings,
        about=task.about,
        token=task.token,
        ranks=Group(rank, size, host, port),
    )
    recipe = importlib.import_module(RECIPES[spec.kind])
    gc.freeze()  # as worker/tasks.py does, and says why
    return recipe.run(spec, context)


if __name__ == "__main__":
    main()
