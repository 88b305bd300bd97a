"""Score with a Python function, on a thread next to generation."""

import asyncio
import inspect
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeAlias

from iiverl_core import activity
from iiverl_core.rewards.scorer import Span, covered
from iiverl_core.samples import Rollout, SampleId
from iiverl_reward_client import Outcome

ScoreFunction: TypeAlias = Callable[[Rollout], Outcome | Awaitable[Outcome]]
"""Returns a rollout's outcome, or an awaitable of it. A rollout that cannot be scored is a `Failed`; an exception is a
bug and ends the run."""

_CLOSING_SECONDS = 1.0


class FunctionScorer:
    """A `Scorer` that calls a function for one rollout at a time, in order of submission.

    All calls come from one thread that the scorer owns, with one event loop for awaitables, so the function need not be
    thread-safe.
    """

    def __init__(self, function: ScoreFunction) -> None:
        self._function = function
        self.busy_spans: list[Span] = []
        self._changed = threading.Condition()
        # Guarded by the condition's lock. `_pending` includes the rollout being scored.
        self._waiting: deque[Rollout] = deque()
        self._pending: set[SampleId] = set()
        self._outcomes: dict[SampleId, Outcome] = {}
        self._spans: list[Span] = []
        self._error: BaseException | None = None
        self._closed = False
        # A daemon, because a function that never returns must not keep the process alive.
        self._thread = threading.Thread(target=self._work, name="iiverl-rewards", daemon=True)
        self._thread.start()

    @property
    def busy_seconds(self) -> float:
        """See `Scorer.busy_seconds`."""
        return covered(self.busy_spans)

    def submit(self, rollout: Rollout) -> None:
        """Queue a rollout; see `Scorer.submit`. Raises `RuntimeError` if the scorer is closed."""
        with self._changed:
            if self._closed:
                raise RuntimeError("the scorer is closed")
            if rollout.id in self._pending or rollout.id in self._outcomes:
                raise ValueError(f"{rollout.id} was submitted twice")
            self._pending.add(rollout.id)
            self._waiting.append(rollout)
            self._changed.notify_all()

    def collect(self) -> Mapping[SampleId, Outcome]:
        """Wait for all outcomes; see `Scorer.collect`.

        Raises:
            RuntimeError: the scorer is closed, or was closed while this waited.
            BaseException: the function raised it. The scorer cannot be used any more.
        """
        with self._changed:
            # Ctrl-C interrupts a wait without a timeout at once.
            self._changed.wait_for(lambda: not self._pending or self._closed or self._error is not None)
            if self._error is not None:
                raise self._error
            if self._closed:
                raise RuntimeError("the scorer is closed")
            outcomes, self._outcomes = self._outcomes, {}
            self.busy_spans, self._spans = self._spans, []
            return outcomes

    def close(self) -> None:
        """Drop pending rollouts and end the thread; a running call has a second to finish and is then abandoned."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify_all()
        self._thread.join(_CLOSING_SECONDS)

    def _work(self) -> None:
        try:
            with asyncio.Runner() as loop:
                while (rollout := self._next()) is not None:
                    began = time.monotonic()
                    outcome = self._function(rollout)
                    if inspect.isawaitable(outcome):
                        outcome = loop.run(_awaited(outcome))
                    self._finish(rollout.id, outcome, (began, time.monotonic()))
        except BaseException as error:  # the waiting thread must see it, whatever it is
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _next(self) -> Rollout | None:
        """Wait for the next rollout; None once the scorer is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            return None if self._closed else self._waiting.popleft()

    def _finish(self, id: SampleId, outcome: Outcome, span: Span) -> None:
        with self._changed:
            self._spans.append(span)
            self._outcomes[id] = outcome
            self._pending.discard(id)
            self._changed.notify_all()
        activity.advance()


async def _awaited(outcome: Awaitable[Outcome]) -> Outcome:
    return await outcome
