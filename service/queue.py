"""The queue: service's only use of RQ. A queue entry is a hint that a job may be run; the claim in SQL decides.

RQ's defaults hurt here and are switched off on purpose: a job may run for days (job_timeout 180 s), its outcome lives
in SQL (result_ttl 500 s, failure_ttl 1 year), and a queued job waits as long as it must (ttl).
"""

from __future__ import annotations

import secrets
import time
from typing import Any

from redis import Redis
from redis.backoff import ConstantBackoff
from redis.exceptions import RedisError
from redis.retry import Retry
from rq import Queue, Worker
from rq.job import Job

TASK = "worker.tasks.run_job"  # by name: service never imports worker
TOKEN_SECONDS = 30 * 86400  # a token whose job is lost with its database must not stay for good
AWAY_SECONDS = 5.0  # after a failure, nobody waits again for a queue server for this long
_SEPARATOR = "-"


def job_of(entry: str) -> str:
    """The job that a queue entry is for."""
    return entry.partition(_SEPARATOR)[0]


class JobQueue:
    """Puts job ids on an RQ queue. Redis only carries work: all of it can be put there again from SQL."""

    def __init__(self, url: str, name: str) -> None:
        # A server that is there but does not answer must not hold up a request: two tries of 2 s, where the client's
        # own would be eleven of 5 s.
        self.redis: Any = Redis.from_url(
            url,
            socket_connect_timeout=2,
            socket_timeout=2,
            retry=Retry(ConstantBackoff(0.1), 1),
            health_check_interval=30,
        )
        self.rq = Queue(name, connection=self.redis, default_timeout=-1)
        self._away_until = 0.0  # monotonic: so long what reconcile() makes up for is not even tried

    def enqueue(self, job_id: str) -> None:
        """Put a job on the queue; a second entry does no harm. Raises redis.RedisError."""
        # An id of its own for each entry: RQ forgets an entry when its run ends, and a job that its own run gives back
        # would be forgotten with it.
        entry = f"{job_id}{_SEPARATOR}{secrets.token_hex(4)}"
        with self.redis.pipeline() as pipeline:  # one transaction; RQ's own way takes two
            self.rq.enqueue_call(
                TASK, args=(job_id,), job_id=entry, timeout=-1, ttl=None, result_ttl=0, failure_ttl=0, pipeline=pipeline
            )
            pipeline.execute()

    def enqueue_soon(self, job_id: str) -> bool:
        """As `enqueue`, but a queue out of reach is not an error: reconcile() puts the job there later."""
        if time.monotonic() < self._away_until:
            return False
        try:
            self.enqueue(job_id)
        except RedisError:
            self._away_until = time.monotonic() + AWAY_SECONDS
            return False
        return True

    def remove(self, job_id: str) -> None:
        """Take a job off the queue, if it is there. Left there, an entry does no harm."""
        if time.monotonic() < self._away_until:
            return
        try:
            for entry in self.rq.get_job_ids():
                if job_of(entry) == job_id:
                    self.rq.remove(entry)
                    self.redis.delete(Job.key_for(entry))
        except RedisError:
            self._away_until = time.monotonic() + AWAY_SECONDS

    def waiting(self) -> set[str]:
        """Job ids on the queue. Raises redis.RedisError."""
        return {job_of(entry) for entry in self.rq.get_job_ids()}

    def length(self) -> int:
        """Entries on the queue. Raises redis.RedisError."""
        return int(self.rq.count)

    def worker_names(self) -> list[str]:
        """Workers that listen on the queue; one that was killed stays listed until its key expires."""
        return [str(w.name) for w in Worker.all(queue=self.rq)]

    def workers(self) -> int:
        return len(self.worker_names())

    def ping(self) -> bool:
        try:
            return bool(self.redis.ping())
        except RedisError:
            return False

    # A hub token lives only here, under the job's id, until the job ends; it is in no row, log, event or answer.
    def keep_token(self, job_id: str, token: str) -> None:
        self.redis.set(f"lorry:hub-token:{job_id}", token, ex=TOKEN_SECONDS)

    def token(self, job_id: str) -> str | None:
        value = self.redis.get(f"lorry:hub-token:{job_id}")
        return value.decode() if value else None

    def forget_token(self, job_id: str) -> None:
        try:
            self.redis.delete(f"lorry:hub-token:{job_id}")
        except RedisError:
            return
