"""python -m service.healthcheck api | worker | engine: exit status 0 if the part in this container does its work.

For container health checks: it asks as a client in the same container would, with the settings of the part itself.
"""

from __future__ import annotations

import argparse
import socket

import httpx
from redis.exceptions import RedisError
from rq import Worker

from service.queue import JobQueue
from service.settings import Settings
from service.up import url_of

SECONDS = 4.0  # a look, not a wait


def main() -> None:
    """Raises SystemExit with the reason if the part is not well."""
    parser = argparse.ArgumentParser(prog="python -m service.healthcheck")
    parser.add_argument("part", choices=["api", "worker", "engine"])
    part = parser.parse_args().part
    settings = Settings()
    if part == "api":
        answers(f"{url_of(settings.host, settings.port)}/readyz?parts=database,queue")
    elif part == "engine":
        answers(f"{url_of(settings.engine_host, settings.engine_port)}/health")
    else:
        listens(settings)


def answers(url: str) -> None:
    try:
        answer = httpx.get(url, timeout=SECONDS, trust_env=False)
    except httpx.HTTPError as error:
        raise SystemExit(f"{url}: {type(error).__name__}") from None
    if not answer.is_success:
        raise SystemExit(f"{url}: {answer.status_code} {answer.text[:500]}")


def listens(settings: Settings) -> None:
    """A worker says every few seconds that it is there; the queue server forgets it 30 s after it last did."""
    host = socket.gethostname()
    try:
        names = [str(w.name) for w in Worker.all(queue=JobQueue(settings.redis_url, settings.queue).rq)]
    except RedisError as error:
        raise SystemExit(f"the queue is out of reach: {type(error).__name__}") from None
    if not any(name.startswith(f"{host}.") for name in names):
        raise SystemExit(f"no worker of {host} is registered on the queue {settings.queue}")


if __name__ == "__main__":
    main()
