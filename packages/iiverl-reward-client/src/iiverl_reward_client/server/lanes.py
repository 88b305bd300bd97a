"""A worker limit and a queue per type, so that a slow verifier does not delay others."""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable

from iiverl_reward_client.outcomes import Scored
from iiverl_reward_client.verifiers import VerifierError

_LONGEST_WAIT = 60.0
_WEIGHT = 0.1  # of the newest duration in the running mean


class Lane:
    """Runs at most `places` at a time; up to `queue` more wait in order, and any others are rejected."""

    def __init__(self, places: int, queue: int) -> None:
        self._count = places
        self._places = asyncio.Semaphore(places)
        self._queue = queue
        self._mean_seconds = 0.0
        self._running: set[asyncio.Task[Scored]] = set()
        self.waiting = 0

    @property
    def in_flight(self) -> int:
        """Number of samples being verified."""
        return len(self._running)

    async def run(self, work: Callable[[], Awaitable[Scored]]) -> Scored:
        """Do the work once there is a free place.

        A caller that is cancelled while it waits leaves the queue. Work that has started runs to its end, since stopping
        it would cost a new process.

        Raises:
            VerifierError: the queue is full (kind `overload`), or the work raised it.
        """
        if self._places.locked() and self.waiting >= self._queue:
            raise VerifierError("overload", f"{self.waiting} samples of this type wait", self._wait())
        self.waiting += 1
        try:
            await self._places.acquire()
        finally:
            self.waiting -= 1
        task = asyncio.ensure_future(self._timed(work))
        self._running.add(task)
        task.add_done_callback(self._free)
        return await asyncio.shield(task)

    async def close(self) -> None:
        """Cancel everything that is being verified."""
        tasks = list(self._running)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _timed(self, work: Callable[[], Awaitable[Scored]]) -> Scored:
        began = time.monotonic()
        try:
            return await work()
        finally:
            self._mean_seconds += _WEIGHT * (time.monotonic() - began - self._mean_seconds)

    def _free(self, task: asyncio.Task[Scored]) -> None:
        self._running.discard(task)
        self._places.release()

    def _wait(self) -> float:
        """Estimate in how many whole seconds half the queue will be processed."""
        seconds = self.waiting / 2 * self._mean_seconds / self._count
        return float(math.ceil(min(max(seconds, 1.0), _LONGEST_WAIT)))
