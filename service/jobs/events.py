"""Events of jobs to those who follow them: one poller for all, whatever their number.

The poller asks SQL a few times a second what is new in the jobs that have followers, and keeps the latest events of
each in a short window. A follower takes what is in the window and reads the rest (a replay, or what it was too slow
for) from SQL in pages, at its own pace; those at the same place share one read. An event is encoded once. So neither
many followers nor slow ones cost the database queries or this process memory for each of them.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from prometheus_client import CollectorRegistry, Counter, Gauge
from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from service.db import Database
from service.jobs.states import FINAL
from service.models import EventRow, JobRow
from service.openai.wire import compact

log = logging.getLogger("lorry.api")
POLL_SECONDS = 0.3
_RETRY_SECONDS = 1.0  # after a page that could not be read
_WINDOW = 256  # events kept per followed job
_WINDOW_BYTES = 1024 * 1024  # and at most this much, but for the newest
_PAGE = 200  # events read at once, at most
_PAGE_BYTES = 64 * 1024  # and about this much: what a follower that does not read holds, beside its connection's buffer
# After the end of a stream that the server ended: an EventSource comes again so soon, with Last-Event-ID.
GOING_ON_ELSEWHERE = b"retry: 1000\n: the API is shutting down: connect again, with Last-Event-ID\n\n"


@dataclass(frozen=True, slots=True)
class Item:
    """An event as it is sent. `last` says that nothing can follow: the job is in a final state."""

    seq: int
    sse: bytes
    last: bool


def _items(session: Session, job_id: str, seq: int, limit: int) -> list[Item]:
    query = select(EventRow.seq, EventRow.type, EventRow.data).where(EventRow.job_id == job_id, EventRow.seq > seq)
    return [
        Item(
            number,
            f"id: {number}\nevent: {type}\ndata: {compact(data)}\n\n".encode(),
            type == "status" and data.get("status") in FINAL,
        )
        for number, type, data in session.execute(query.order_by(EventRow.seq).limit(limit))
    ]


@dataclass(eq=False)
class _Feed:
    """A followed job: the latest events, and a wake-up for its followers."""

    head: int = 0  # seq of the newest event seen; 0 before the first poll
    window: deque[Item] = field(default_factory=deque)
    bytes: int = 0  # of the window
    followers: int = 0
    news: asyncio.Event = field(default_factory=asyncio.Event)
    event_bytes: int = 2000  # what an event of the last page took; sets the size of the next one
    reads: dict[int, asyncio.Task[list[Item]]] = field(default_factory=dict)  # under way, by the seq they begin behind

    def add(self, items: Sequence[Item], head: int) -> None:
        if items and self.window and items[0].seq != self.window[-1].seq + 1:
            self.window.clear()  # a gap: what is older is read from SQL
            self.bytes = 0
        self.window.extend(items)
        self.bytes += sum(len(item.sse) for item in items)
        while len(self.window) > _WINDOW or (self.bytes > _WINDOW_BYTES and len(self.window) > 1):
            self.bytes -= len(self.window.popleft().sse)
        self.head = head
        self.news.set()

    def after(self, seq: int) -> list[Item] | None:
        """Events after `seq` from the window; None if it does not reach back that far."""
        if self.head and seq >= self.head:
            return []
        if not self.window or self.window[0].seq > seq + 1:
            return None
        items = list(takewhile(lambda item: item.seq > seq, reversed(self.window)))
        items.reverse()
        return items


class EventHub:
    """Belongs to one app and its event loop."""

    def __init__(self, db: Database, registry: CollectorRegistry | None = None) -> None:
        self._db = db
        self._feeds: dict[str, _Feed] = {}
        self._poller: asyncio.Task[None] | None = None
        self._wanted = asyncio.Event()
        self._stopping = False
        self.polls = 0  # how often SQL was asked for news
        self.reads = 0  # and for a page
        self._followers = Gauge("lorry_event_followers", "Open streams of jobs' events.", registry=registry)
        self._polls = Counter("lorry_event_polls", "Queries for news of all followed jobs.", registry=registry)
        self._reads = Counter("lorry_event_reads", "Queries for a page of a job's events.", registry=registry)
        self._registry = registry

    async def stream(self, job_id: str, seq: int, *, ended: bool = False) -> AsyncGenerator[bytes, None]:
        """Server-sent events of an existing job after `seq`, in order, until its final state or until `stop`.

        Each chunk holds whole events. `ended`: the job is in a final state, so none but those stored will come.
        """
        feed = self._feeds.setdefault(job_id, _Feed())
        feed.followers += 1
        self._followers.inc()
        if self._poller is None:
            self._poller = asyncio.create_task(self._poll_forever())
        self._wanted.set()
        try:
            while not self._stopping:
                feed.news.clear()  # no await between this and the look at the window: nothing can be missed
                items = feed.after(seq)
                if items is None:
                    items = await self._page(job_id, feed, seq)
                    if items == [] and ended:
                        return  # the rest was deleted
                if items is None:
                    await asyncio.sleep(_RETRY_SECONDS)
                elif not items:
                    await feed.news.wait()
                else:
                    for chunk in _chunks(items):
                        yield chunk
                    seq = items[-1].seq
                    if items[-1].last:
                        return
            yield GOING_ON_ELSEWHERE
        finally:
            self._followers.dec()
            feed.followers -= 1
            if not feed.followers and self._feeds.get(job_id) is feed:
                del self._feeds[job_id]

    def stop(self) -> None:
        """End all streams: their followers can go on at another process, or at this one's successor."""
        self._stopping = True
        for feed in self._feeds.values():
            feed.news.set()

    async def close(self) -> None:
        self.stop()
        if self._poller is not None:
            self._poller.cancel()
            await asyncio.gather(self._poller, return_exceptions=True)
        if self._registry is not None:
            for metric in (self._followers, self._polls, self._reads):
                self._registry.unregister(metric)

    async def _page(self, job_id: str, feed: _Feed, seq: int) -> list[Item] | None:
        """Events after `seq` from SQL, one read for all who ask meanwhile; None if the database is out of reach."""
        read = feed.reads.get(seq)
        if read is None:
            self.reads += 1
            self._reads.inc()
            limit = max(1, min(_PAGE, _PAGE_BYTES // feed.event_bytes))
            read = feed.reads[seq] = asyncio.create_task(run_in_threadpool(self._read, job_id, seq, limit))
            read.add_done_callback(lambda _: feed.reads.pop(seq))
        try:
            items = await asyncio.shield(read)  # one that leaves takes it from nobody else
        except SQLAlchemyError as error:
            log.warning("events: a page could not be read, will try again: %s", error)
            return None
        if items:
            feed.event_bytes = max(1, sum(len(item.sse) for item in items) // len(items))
        return items

    def _read(self, job_id: str, seq: int, limit: int) -> list[Item]:
        with self._db.read() as session:
            return _items(session, job_id, seq, limit)

    async def _poll_forever(self) -> None:
        while True:
            if not self._feeds:
                self._wanted.clear()
                await self._wanted.wait()
            try:
                await self._poll()
            except Exception:  # the database may be away for a while
                log.exception("events: poll failed, will try again")
            await asyncio.sleep(POLL_SECONDS)

    async def _poll(self) -> None:
        known = {job_id: feed.head for job_id, feed in self._feeds.items()}
        self.polls += 1
        self._polls.inc()
        for job_id, (head, items) in (await run_in_threadpool(self._news, known)).items():
            feed = self._feeds.get(job_id)
            if feed is not None:
                feed.add(items, head)

    def _news(self, known: dict[str, int]) -> dict[str, tuple[int, list[Item]]]:
        """Per job with something new: (newest seq, the latest of the new events)."""
        out: dict[str, tuple[int, list[Item]]] = {}
        with self._db.read() as session:
            heads = session.execute(select(JobRow.id, JobRow.event_seq).where(JobRow.id.in_(known))).all()
            for job_id, head in heads:
                if head > known[job_id]:
                    items = _items(session, job_id, max(known[job_id], head - _WINDOW), 2 * _WINDOW)
                    # Under READ COMMITTED the events may be newer than the head that was read.
                    out[job_id] = (items[-1].seq if items else head, items)
        return out


def _chunks(items: Iterable[Item]) -> Iterable[bytes]:
    """Events joined to chunks of some size: one write costs about as much as another, whatever it carries."""
    chunk: list[bytes] = []
    size = 0
    for item in items:
        chunk.append(item.sse)
        size += len(item.sse)
        if size >= 32 * 1024:
            yield b"".join(chunk)
            chunk, size = [], 0
    if chunk:
        yield b"".join(chunk)
