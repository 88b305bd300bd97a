"""Score with a Python function in this process, on a thread next to generation."""

import asyncio
import inspect
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TypeAlias

from iiverl_core.rewards.threads import ThreadScorer
from iiverl_core.samples import Rollout
from iiverl_reward_client import Outcome

ScoreFunction: TypeAlias = Callable[[Rollout], Outcome | Awaitable[Outcome]]
"""Returns a rollout's outcome, or an awaitable of it. A rollout that cannot be scored is a `Failed`; an exception is a
bug and ends the run."""


class FunctionScorer(ThreadScorer):
    """A `Scorer` that calls a function for one rollout at a time, in order of submission.

    All calls come from one thread, with one event loop for awaitables, so the function need not be thread-safe.
    """

    def __init__(self, function: ScoreFunction) -> None:
        super().__init__()
        self._function = function
        self._waiting: deque[Rollout] = deque()
        self._thread.start()

    def _take(self, rollout: Rollout) -> None:
        self._waiting.append(rollout)
        self._changed.notify_all()

    def _end(self) -> None:
        self._waiting.clear()

    def _work(self) -> None:
        with asyncio.Runner() as loop:
            while (rollout := self._next()) is not None:
                began = time.monotonic()
                outcome = self._function(rollout)
                if inspect.isawaitable(outcome):
                    outcome = loop.run(_awaited(outcome))
                self._finish(rollout.id, outcome, (began, time.monotonic()))

    def _next(self) -> Rollout | None:
        """Wait for the next rollout; None once the scorer is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            return None if self._closed else self._waiting.popleft()


async def _awaited(outcome: Awaitable[Outcome]) -> Outcome:
    return await outcome
