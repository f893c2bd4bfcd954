"""One of several engines, and whether it answers.

Every few seconds each engine is asked for its health. One that refuses a connection, breaks off, keeps silent or says that
it ends is left out, and asked again after a pause that doubles; what it holds is asked anew when it is back. One that is
asleep, because a job has its memory, gets a request when no other engine fits, and says itself when to ask again.
"""

from __future__ import annotations

import asyncio
import logging
import time

from service.engine_answer import EngineAway
from service.engine_client import EngineClient
from service.errors import LorryError
from service.storage import Storage

log = logging.getLogger("lorry.api")
WATCH = 5.0  # seconds between two looks at an engine that answers
PROBE = 5.0  # seconds in which it has to
SILENT = 3  # looks in a row without an answer, after which what the engine has open counts as broken off
FIRST_PAUSE = 1.0  # seconds for which an engine is left out at first
LONGEST_PAUSE = 30.0


class Engine(EngineClient):
    """An engine, what this API has open there, and since when it is away."""

    def __init__(self, url: str, storage: Storage, *, alone: bool) -> None:
        super().__init__(url, storage)
        self.open_requests = 0
        self.away: str | None = None  # why, while it is left out
        self.asleep = False  # it answers, and a job has its memory: others are asked first
        self._alone = alone
        self._since = 0.0
        self._pause = FIRST_PAUSE / 2
        self._silent = 0
        self._wake = asyncio.Event()
        self._checking: asyncio.Task[None] | None = None

    async def aclose(self) -> None:
        if self._checking is not None:
            self._checking.cancel()
        await super().aclose()

    def left(self, error: LorryError) -> None:
        """Leave it out for a while, for this reason."""
        self.doubt()
        if self.away is None:
            # At a start of everything the engine comes last.
            level = logging.INFO if self.view is None else logging.WARNING
            log.log(level, "engine %s is away: %s", self.name, error.message)
            self._since = time.monotonic()
            self._longer()
            self._wake.set()
        self.away = error.message

    def _longer(self) -> None:
        self._pause = min(LONGEST_PAUSE, self._pause * 2)

    def back(self) -> None:
        """It answers."""
        self._silent = 0
        if self.away is None:
            self._pause = FIRST_PAUSE / 2  # it has been here for a while
            return
        log.info("engine %s answers again after %.1f s", self.name, time.monotonic() - self._since)
        self.away = None

    def slept(self, asleep: bool = True) -> None:
        """Whether it has given its memory to a job."""
        if asleep != self.asleep:
            log.info("engine %s %s", self.name, "is asleep" if asleep else "is awake again")
            self.asleep = asleep
            if asleep:
                self.hand_over()

    def suspect(self) -> None:
        """Have a look at it soon."""
        self._wake.set()

    async def check(self) -> None:
        """Find out whether it answers, and if it was away, or nothing is known of it, what it holds."""
        if self._checking is None or self._checking.done():
            self._checking = asyncio.create_task(self._check())
        await asyncio.shield(self._checking)

    async def _check(self) -> None:
        try:
            self.slept(not await self.healthy(PROBE))
            if self.view is None or self.away is not None:
                await self.look()
        except LorryError as error:
            self._silent = self._silent + 1 if isinstance(error, EngineAway) and error.silent else 0
            self.left(error)
            if self._silent >= SILENT and not self._alone:  # without another engine, waiting may still help
                self.cut_off(before=time.monotonic() - (SILENT - 1) * PROBE)
        else:
            self.back()

    async def watch(self) -> None:
        """Check it for ever."""
        while True:
            was_away = self.away is not None
            await self.check()
            if was_away and self.away is not None:
                self._longer()
            await self._rest()

    async def _rest(self) -> None:
        """Until the next look, counted anew when it goes away meanwhile."""
        while True:
            self._wake.clear()
            try:
                async with asyncio.timeout(WATCH if self.away is None else self._pause):
                    await self._wake.wait()
            except TimeoutError:
                return
            if self.away is None:  # suspected
                return
