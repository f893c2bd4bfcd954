"""python -m service.healthcheck api | worker | engine: exit status 0 if the part in this container does its work.

For container health checks: it asks as a client in the same container would, with the settings of the part itself. It
runs every few seconds, so it brings in no more than it needs.
"""

from __future__ import annotations

import argparse
import socket
import urllib.error
import urllib.request

from service.settings import Settings

SECONDS = 4.0  # a look, not a wait


def main() -> None:
    """Raises SystemExit with the reason if the part is not well."""
    parser = argparse.ArgumentParser(prog="python -m service.healthcheck")
    parser.add_argument("part", choices=["api", "worker", "engine"])
    part = parser.parse_args().part
    settings = Settings()
    if part == "api":
        answers(settings.host, settings.port, "/readyz?parts=database,queue")
    elif part == "engine":
        answers(settings.engine_host, settings.engine_port, "/health")
    else:
        listens(settings)


def answers(host: str, port: int, path: str) -> None:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}{path}"
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        direct.open(url, timeout=SECONDS).close()
    except urllib.error.HTTPError as error:
        raise SystemExit(f"{url}: {error.code} {error.read(500).decode('utf-8', 'replace')}") from None
    except OSError as error:
        raise SystemExit(f"{url}: {error}") from None


def listens(settings: Settings) -> None:
    """A worker says every few seconds that it is there; the queue server forgets it 30 s after it last did."""
    from redis.exceptions import RedisError

    from service.queue import JobQueue

    host = socket.gethostname()
    try:
        names = JobQueue(settings.redis_url, settings.queue).worker_names()
    except RedisError as error:
        raise SystemExit(f"the queue is out of reach: {type(error).__name__}") from None
    if not any(name.startswith(f"{host}.") for name in names):
        raise SystemExit(f"no worker of {host} is registered on the queue {settings.queue}")


if __name__ == "__main__":
    main()
