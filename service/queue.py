"""The queues: service's only use of RQ. A queue entry is a hint that a job may be run; the claim in SQL decides.

RQ's defaults hurt here and are switched off on purpose: a job may run for days (job_timeout 180 s), its outcome lives
in SQL (result_ttl 500 s, failure_ttl 1 year), and a queued job waits as long as it must (ttl).
"""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from redis import Redis
from redis.backoff import ConstantBackoff
from redis.exceptions import RedisError
from redis.retry import Retry
from rq import Queue, Worker, worker_registration
from rq.job import Job

from service.queue_names import NEEDS, pools_of, queue_of, queues_of

TASK = "worker.tasks.run_job"  # by name: service never imports worker
TOKEN_SECONDS = 30 * 86400  # a token whose job is lost with its database must not stay for good
AWAY_SECONDS = 5.0  # after a failure, nobody waits again for a queue server for this long
_SEPARATOR = "-"


def job_of(entry: str) -> str:
    """The job that a queue entry is for."""
    return entry.partition(_SEPARATOR)[0]


class JobQueue:
    """Puts job ids on the RQ queues of an installation, `name` being LORRY_QUEUE and the first of their names.

    Redis only carries work: all of it can be put there again from SQL.
    """

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
        self.name = name
        self.rq = self._queue(name)  # for jobs without needs and of normal priority
        self._away_until = 0.0  # monotonic: so long what reconcile() makes up for is not even tried

    def _queue(self, name: str) -> Queue:
        return Queue(name, connection=self.redis, default_timeout=-1)

    def names(self) -> list[str]:
        """The queues of this installation: all without a pool, and of pools those that ever had an entry.

        Raises redis.RedisError.
        """
        prefix = Queue.redis_queue_namespace_prefix
        known = [str(key.decode()).removeprefix(prefix) for key in self.redis.smembers(Queue.redis_queues_keys)]
        return queues_of(self.name, NEEDS) + sorted(n for n in known if n.startswith(pools_of(self.name)))

    def enqueue(self, job_id: str, spec: Mapping[str, Any]) -> None:
        """Put a job on the queue that its spec names; a second entry does no harm. Raises redis.RedisError."""
        # An id of its own for each entry: RQ forgets an entry when its run ends, and a job that its own run gives back
        # would be forgotten with it.
        entry = f"{job_id}{_SEPARATOR}{secrets.token_hex(4)}"
        with self.redis.pipeline() as pipeline:  # one transaction; RQ's own way takes two
            self._queue(queue_of(self.name, spec)).enqueue_call(
                TASK, args=(job_id,), job_id=entry, timeout=-1, ttl=None, result_ttl=0, failure_ttl=0, pipeline=pipeline
            )
            pipeline.execute()

    def enqueue_soon(self, job_id: str, spec: Mapping[str, Any]) -> bool:
        """As `enqueue`, but a queue out of reach is not an error: reconcile() puts the job there later."""
        if time.monotonic() < self._away_until:
            return False
        try:
            self.enqueue(job_id, spec)
        except RedisError:
            self._away_until = time.monotonic() + AWAY_SECONDS
            return False
        return True

    def remove(self, job_id: str) -> None:
        """Take a job off whichever queue it is on. Left there, an entry does no harm."""
        if time.monotonic() < self._away_until:
            return
        try:
            for name, entries in self._entries().items():
                for entry in entries:
                    if job_of(entry) == job_id:
                        self._queue(name).remove(entry)
                        self.redis.delete(Job.key_for(entry))
        except RedisError:
            self._away_until = time.monotonic() + AWAY_SECONDS

    def _entries(self) -> dict[str, list[str]]:
        names = self.names()
        with self.redis.pipeline(transaction=False) as pipeline:
            for name in names:
                pipeline.lrange(self._queue(name).key, 0, -1)
            found = pipeline.execute()
        return {name: [entry.decode() for entry in entries] for name, entries in zip(names, found, strict=True)}

    def waiting(self) -> set[str]:
        """Job ids on any of the queues. Raises redis.RedisError."""
        return {job_of(entry) for entries in self._entries().values() for entry in entries}

    def lengths(self) -> dict[str, int]:
        """Entries by queue. Raises redis.RedisError."""
        names = self.names()
        with self.redis.pipeline(transaction=False) as pipeline:
            for name in names:
                pipeline.llen(self._queue(name).key)
            return dict(zip(names, pipeline.execute(), strict=True))

    def length(self) -> int:
        """Entries on all queues. Raises redis.RedisError."""
        return sum(self.lengths().values())

    def listening(self) -> dict[str, list[str]]:
        """Queues of this installation by the name of a worker that takes from them. Raises redis.RedisError.

        A worker that was killed stays listed until its key expires.
        """
        keys = sorted(self.redis.smembers(worker_registration.REDIS_WORKER_KEYS))
        with self.redis.pipeline(transaction=False) as pipeline:
            for key in keys:
                pipeline.hget(key, "queues")
            found = pipeline.execute()
        workers = {}
        for key, value in zip(keys, found, strict=True):
            queues = [n for n in (value or b"").decode().split(",") if n == self.name or n.startswith(f"{self.name}:")]
            if queues:
                workers[key.decode().removeprefix(Worker.redis_worker_namespace_prefix)] = queues
        return workers

    def worker_names(self) -> list[str]:
        """Workers that take from any of the queues. Raises redis.RedisError."""
        return list(self.listening())

    def workers(self) -> dict[str, int]:
        """Number of workers by queue; a queue that nobody listens to is not in it. Raises redis.RedisError."""
        return dict(Counter(name for names in self.listening().values() for name in names))

    def unheard(self) -> dict[str, int]:
        """Entries by queue, of queues that have some and no worker. Raises redis.RedisError."""
        workers = self.workers()
        return {name: length for name, length in self.lengths().items() if length and name not in workers}

    def place(self, spec: Mapping[str, Any]) -> tuple[str, int | None]:
        """The queue that a spec names, and its workers' number; None if the queue server is out of reach."""
        name = queue_of(self.name, spec)
        if time.monotonic() < self._away_until:
            return name, None
        try:
            return name, self.workers().get(name, 0)
        except RedisError:
            self._away_until = time.monotonic() + AWAY_SECONDS
            return name, None

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
