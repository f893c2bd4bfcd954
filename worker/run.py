"""The RQ parent: takes ids from the queue, forks a child per job, settles what a dead child left behind. No torch here."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import time
from pathlib import Path
from typing import Any

from redis import Redis
from redis.backoff import ConstantBackoff
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeout
from redis.retry import Retry
from rq import Queue, Worker, worker_registration
from rq.exceptions import StopRequested
from rq.job import Job
from rq.utils import now
from sqlalchemy.exc import SQLAlchemyError

from service.db import Database
from service.gpus import CPU, gpus_of
from service.jobs import repository
from service.jobs.states import ACTIVE
from service.logs import belonging, configure
from service.migrate import is_current
from service.queue import JobQueue, job_of
from service.queue_names import needs_of, queues_of, sees_gpu
from service.reconcile import give_back, reconcile
from service.settings import Settings
from worker.gpu_share import give_back as give_back_gpu
from worker.progress import persist

log = logging.getLogger("lorry.worker")
_STOPS = (signal.SIGTERM, signal.SIGINT)
STRAY_TIMEOUTS = 15  # heartbeat time-outs (20 s each) that a child may live without having its job


class LorryWorker(Worker):  # type: ignore[misc, unused-ignore]
    """An RQ worker whose jobs' outcomes live in SQL.

    The child is asked to checkpoint when this process is told to stop, and once more killed if it takes too long.
    """

    max_connection_wait_time = 5.0  # between tries to reach a queue server that is away; RQ's own would be a minute

    def __init__(self, settings: Settings, **kwargs: Any) -> None:
        self.settings = settings
        self.horse_status: int | None = None
        self.oom_kills: int | None = None  # before the job
        self.stop_deadline: float | None = None
        self.told_to_stop = False
        self.reconciled = float("-inf")
        self.running: str | None = None  # the job of the child
        self.astray: float | None = None  # since when the child has been seen without it
        name = f"{socket.gethostname()}.{os.getpid()}.{os.urandom(3).hex()}"
        # Two tries: with redis-py's eleven, a server that is there but does not answer would hold this process up for
        # minutes, its child unwatched.
        retry = Retry(ConstantBackoff(0.5), 1)
        connection = Redis.from_url(settings.redis_url, health_check_interval=30, retry=retry)
        owns_gpu = sees_gpu() and CPU not in gpus_of(settings.gpus)
        needs = needs_of(settings.worker_queues, gpu=owns_gpu)
        super().__init__(
            # RQ takes from the first of its queues that has an entry: the order is the priority.
            [Queue(queue, connection=connection, default_timeout=-1) for queue in queues_of(settings.queue, needs)],
            name=name,
            connection=connection,
            default_result_ttl=0,
            # RQ's own time-outs are not used: SQL's heartbeats say who is alive. The TTL only bounds how long a dead
            # worker stays listed, and the monitoring interval how often a live child is looked at.
            worker_ttl=30,
            job_monitoring_interval=5,
            **kwargs,
        )

    @property
    def dequeue_timeout(self) -> int:
        return max(1, round(self.settings.reconcile_seconds))  # an idle worker looks after the others' runs, too

    def dequeue_job_and_maintain_ttl(self, timeout: int | None, max_idle_time: int | None = None) -> Any:
        """Wait for an entry, through outages of the queue server of any kind; RQ itself gives up on one that hangs."""
        while True:
            try:
                return super().dequeue_job_and_maintain_ttl(timeout, max_idle_time)
            except RedisTimeout as error:
                log.warning("the queue server does not answer, trying again: %s", error)

    def execute_job(self, job: Job, queue: Queue) -> Any:
        self.horse_status = None
        self.oom_kills = oom_kills()
        self.running, self.astray = job_of(job.id), None
        with belonging(job=job_of(job.id)):
            try:
                return super().execute_job(job, queue)
            except StopRequested:  # told to stop before the fork; the entry is gone, reconcile() makes another
                raise
            except Exception as error:  # RQ stumbles over what a wiped queue server forgot, in ways of every kind
                log.warning("the queue lost track of the job: %r", error)  # its outcome is in SQL all the same
                return None
            finally:
                give_back_gpu(self.settings, self.name)
                self.settle(job_of(job.id))
                self.running = None

    def fork_work_horse(self, job: Job, queue: Queue) -> None:
        # A signal to the child waits until it has handlers of its own: with this process's it would be lost.
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
        try:
            super().fork_work_horse(job, queue)  # returns in the parent only
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)

    def setup_work_horse_signals(self) -> None:
        super().setup_work_horse_signals()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)

    def monitor_work_horse(self, job: Job, queue: Queue) -> None:
        """Watch the child until it has ended, whatever becomes of the queue meanwhile."""
        while True:
            try:
                super().monitor_work_horse(job, queue)
                return
            except Exception as error:  # as above; no error of RQ's may leave a living child unwatched
                log.warning("the queue is out of reach, the job goes on: %r", error)
                if not self.horse_pid or self.horse_status is not None:
                    return  # the child has ended; what failed was the queue's record of it
                time.sleep(1)

    def clean_registries(self) -> None:
        """RQ's own book-keeping, which nothing here depends on."""
        try:
            super().clean_registries()
        except RedisError:
            raise
        except Exception as error:
            log.warning("RQ could not tidy up: %r", error)
            self.last_cleaned_at = now()

    def heartbeat(self, timeout: int | None = None, pipeline: Any = None) -> None:
        self.reconcile()  # first: it must also be done while the queue server is away
        super().heartbeat(timeout, pipeline)
        # Again: a queue server that lost its data forgot this worker, and what it listens to.
        worker_registration.register(self, pipeline)
        (self.connection if pipeline is None else pipeline).hset(self.key, "queues", ",".join(self.queue_names()))

    def reconcile(self) -> None:
        """Compare SQL with the queue now and then; the API does the same, but it may be down."""
        if self.is_horse or time.monotonic() - self.reconciled < self.settings.reconcile_seconds:
            return
        self.reconciled = time.monotonic()
        db = Database(self.settings.sqlalchemy_url)  # one for each pass: nothing of it may cross a fork
        try:
            reconcile(db, JobQueue(self.settings.redis_url, self.settings.queue), self.settings, store=False)
            self.end_stray(db)
        except SQLAlchemyError as error:
            log.warning("could not reconcile: %s", error)
        finally:
            db.dispose()

    def end_stray(self, db: Database) -> None:
        """Kill a child that has not had its job for long: it hangs, and this worker would never take another."""
        if not self.horse_pid or self.running is None:
            return
        with db.read() as session:
            row = repository.get(session, self.running)
        now = time.monotonic()
        if row is not None and row.status in ACTIVE and row.worker == self.name:
            self.astray = None
        elif self.astray is None:
            self.astray = now
        elif now - self.astray > STRAY_TIMEOUTS * self.settings.heartbeat_timeout_seconds:
            log.error("process %d hangs without its job and is killed", self.horse_pid)
            self.kill_horse(signal.SIGKILL)

    def kill_horse(self, sig: signal.Signals = signal.SIGKILL) -> None:
        """Kill the child and what it started. RQ's own kills its process group, which is still this process's, and that
        of who started it, until the child has got as far as making one of its own."""
        try:
            if os.getpgid(self.horse_pid) == self.horse_pid:
                os.killpg(self.horse_pid, sig)
            else:
                os.kill(self.horse_pid, sig)
        except ProcessLookupError:
            pass

    def wait_for_horse(self) -> Any:
        if self.stop_deadline and time.monotonic() > self.stop_deadline:
            log.error("the job did not stop within %g s and is killed", self.settings.shutdown_seconds)
            self.kill_horse(signal.SIGKILL)
        elif self.stop_deadline:
            self.ask_horse_to_stop()  # again: a child just forked ignores the signal until it has a handler
        pid, status, usage = super().wait_for_horse()
        if status is not None:
            self.horse_status = status
        return pid, status, usage

    def settle(self, job_id: str) -> None:
        """If the child left its job unfinished it died: say why, and give the job back.

        With the database away or full this is left to reconcile(), which will see the run fall silent.
        """
        db, queue = Database(self.settings.sqlalchemy_url), JobQueue(self.settings.redis_url, self.settings.queue)
        try:
            row = persist(db, lambda session: repository.get(session, job_id), write=False)
            if row is not None and row.status in ACTIVE and row.worker == self.name:
                give_back(
                    db,
                    queue,
                    self.settings,
                    job_id,
                    row.run_id,
                    code="worker_killed",
                    reason=describe(self.horse_status, oom=oom_kills() != self.oom_kills),
                )
        except SQLAlchemyError as error:
            log.warning("could not settle job %s: %s", job_id, error)
        finally:
            db.dispose()

    def handle_warm_shutdown_request(self) -> None:
        super().handle_warm_shutdown_request()
        self.told_to_stop = True
        self.ask_horse_to_stop()

    def request_force_stop(self, signum: int, frame: Any) -> None:
        # RQ's second signal kills the child at once; a job should lose nothing to an impatient Ctrl-C.
        self.ask_horse_to_stop()

    def ask_horse_to_stop(self) -> None:
        if self.horse_pid:
            self.stop_deadline = self.stop_deadline or time.monotonic() + self.settings.shutdown_seconds
            try:
                os.kill(self.horse_pid, signal.SIGUSR1)
            except ProcessLookupError:
                pass


_NATIVE_FAULTS = ("SIGSEGV", "SIGBUS", "SIGABRT", "SIGILL", "SIGFPE")


def describe(status: int | None, *, oom: bool = False) -> str:
    """A wait status in words; `oom`: the kernel ended some process for want of memory meanwhile."""
    if status is None:
        return "its process ended without a word"
    if not os.WIFSIGNALED(status):
        return f"its process ended with exit code {os.WEXITSTATUS(status)}"
    name = signal.Signals(os.WTERMSIG(status)).name
    hint = ""
    if name == "SIGKILL" and oom:
        hint = (
            " for want of memory (the kernel ended a process for it meanwhile): use a smaller batch or max_seq_length"
        )
    elif name == "SIGKILL":
        hint = "; if nobody did this, the kernel may have ended it for want of memory"
    elif name in _NATIVE_FAULTS:
        hint = ": a fault in native code, such as a library or a driver; the end of the job's log has the stack"
    return f"its process was killed by {name}{hint}"


def oom_kills() -> int | None:
    """How many processes the kernel has ended for want of memory, since the start; None where it does not say."""
    try:
        return int(re.findall(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), re.MULTILINE)[0])
    except (OSError, IndexError):
        return None


def main(queues: str | None = None, gpus: str | None = None) -> None:
    """`lorry worker`: run until told to stop. SIGTERM and SIGINT let the running job checkpoint and go back to the queue.

    `queues` goes before LORRY_WORKER_QUEUES, `gpus` before LORRY_GPUS.
    """
    if gpus is not None:
        os.environ["LORRY_GPUS"] = gpus  # where the jobs' processes look
    settings = Settings() if queues is None else Settings(worker_queues=queues)
    configure(settings, "worker")
    if not is_current(settings.sqlalchemy_url):
        raise SystemExit("the database is not at the newest revision: run `lorry migrate`")
    wait_for_queue(settings)
    db = Database(settings.sqlalchemy_url)
    reconcile(db, JobQueue(settings.redis_url, settings.queue), settings, store=False)
    db.dispose()  # nothing of it may cross the fork
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # inherited by the child, until it can act on it
    try:
        while not work(settings):
            log.warning("the queue server failed; looking for it again")
            wait_for_queue(settings)
    except StopRequested:  # told to stop while it waited for the queue server
        return


def work(settings: Settings) -> bool:
    """Take jobs until told to stop (True) or until the queue server fails in a way that RQ does not get over (False)."""
    worker = LorryWorker(settings)
    os.environ["LORRY_WORKER_PID"] = str(os.getpid())  # by which a child knows whether its parent still lives
    try:
        worker.work(with_scheduler=False, logging_level=settings.log_level.upper())
    except RedisError as error:
        log.warning("the queue is out of reach: %s", error)
    return worker.told_to_stop


def wait_for_queue(settings: Settings, seconds: float = 60) -> None:
    """Wait for the Redis-protocol server. Raises SystemExit if it does not answer in time."""
    redis: Any = Redis.from_url(settings.redis_url)
    deadline = time.monotonic() + seconds
    while True:
        try:
            redis.ping()
            return
        except RedisError as error:
            if time.monotonic() > deadline:
                raise SystemExit(f"no answer from the queue server: {error}") from error
            time.sleep(0.5)


if __name__ == "__main__":
    main()
