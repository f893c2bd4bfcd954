"""Events of jobs to those who follow them: one poller for all, whatever their number.

The poller asks SQL a few times a second what is new in the jobs that have followers, and keeps the latest events of
each in a short window. A follower takes what is in the window and reads the rest (a replay, or what it was too slow
for) from SQL in pages, at its own pace, so that a slow reader costs no memory.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import select
from starlette.concurrency import run_in_threadpool

from service.db import Database
from service.jobs import repository
from service.jobs.states import FINAL
from service.models import JobRow

log = logging.getLogger("lorry.api")
POLL_SECONDS = 0.3
_WINDOW = 256  # events kept per followed job
_PAGE = 500


@dataclass(frozen=True)
class Item:
    """An event as it is sent."""

    seq: int
    type: str
    data: dict[str, Any]

    @property
    def last(self) -> bool:
        """Whether nothing can follow: the job is in a final state."""
        return self.type == "status" and self.data.get("status") in FINAL


@dataclass
class _Feed:
    """A followed job: the latest events, and a wake-up for its followers."""

    head: int  # seq of the newest event seen
    window: deque[Item] = field(default_factory=lambda: deque(maxlen=_WINDOW))
    followers: int = 0
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def after(self, seq: int) -> list[Item] | None:
        """Events after `seq` from the window; None if it does not reach back that far."""
        if seq >= self.head:
            return []
        if not self.window or self.window[0].seq > seq + 1:
            return None
        return [item for item in self.window if item.seq > seq]


class EventHub:
    """Belongs to one app and its event loop."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._feeds: dict[str, _Feed] = {}
        self._poller: asyncio.Task[None] | None = None
        self._wanted = asyncio.Event()
        self.polls = 0  # for the tests: how often SQL was asked

    async def follow(self, job_id: str, seq: int) -> AsyncGenerator[Item, None]:
        """Events of an existing job after `seq`, in order, until the one of its final state."""
        feed = self._feeds.setdefault(job_id, _Feed(head=0))
        feed.followers += 1
        if self._poller is None:
            self._poller = asyncio.create_task(self._poll_forever())
        self._wanted.set()
        try:
            # The window says nothing before the first poll, so a new follower begins with a read of its own.
            items: list[Item] | None = None
            while True:
                if items is None:
                    items = await run_in_threadpool(self._read, job_id, seq)
                    rest = len(items) == _PAGE
                else:
                    rest = False
                for item in items:
                    yield item
                    seq = item.seq
                    if item.last:
                        return
                feed.news.clear()  # no await between this and the look at the window: nothing can be missed
                items = None if rest else feed.after(seq)
                if items == []:
                    await feed.news.wait()
                    items = feed.after(seq)
        finally:
            feed.followers -= 1
            if not feed.followers and self._feeds.get(job_id) is feed:
                del self._feeds[job_id]

    async def close(self) -> None:
        if self._poller is not None:
            self._poller.cancel()
            await asyncio.gather(self._poller, return_exceptions=True)

    def _read(self, job_id: str, seq: int) -> list[Item]:
        with self._db.read() as session:
            return [Item(r.seq, r.type, r.data) for r in repository.events_after(session, job_id, seq, _PAGE)]

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
        for job_id, (head, items) in (await run_in_threadpool(self._news, known)).items():
            feed = self._feeds.get(job_id)
            if feed is None:
                continue
            if items and feed.window and items[0].seq != feed.window[-1].seq + 1:
                feed.window.clear()  # a gap: what is older is read from SQL
            feed.window.extend(items)
            feed.head = head
            feed.news.set()

    def _news(self, known: dict[str, int]) -> dict[str, tuple[int, list[Item]]]:
        """Per job with something new: (newest seq, the latest of the new events)."""
        out: dict[str, tuple[int, list[Item]]] = {}
        with self._db.read() as session:
            heads = session.execute(select(JobRow.id, JobRow.event_seq).where(JobRow.id.in_(known))).all()
            for job_id, head in heads:
                if head > known[job_id]:
                    rows = repository.events_after(session, job_id, max(known[job_id], head - _WINDOW))
                    items = [Item(r.seq, r.type, r.data) for r in rows]
                    # Under READ COMMITTED the events may be newer than the head that was read.
                    out[job_id] = (items[-1].seq if items else head, items)
        return out
