"""The part of a scorer that is common to all that score on a thread next to generation."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping

from iiverl_core import activity
from iiverl_core.rewards.scorer import Span, covered
from iiverl_core.samples import Rollout, SampleId
from iiverl_reward_client import Outcome

_CLOSING_SECONDS = 1.0


class ThreadScorer(ABC):
    """A `Scorer` with a thread of its own: a subclass takes rollouts in `_take`, and reports outcomes by `_finish`."""

    def __init__(self) -> None:
        self.busy_spans: list[Span] = []
        self._changed = threading.Condition()
        # Guarded by the condition's lock. `_pending` are the rollouts that wait or are being scored.
        self._pending: set[SampleId] = set()
        self._outcomes: dict[SampleId, Outcome] = {}
        self._spans: dict[SampleId, Span] = {}
        self._error: BaseException | None = None
        self._closed = False
        # A daemon, because a function that never returns must not keep the process alive.
        self._thread = threading.Thread(target=self._run, name="iiverl-rewards", daemon=True)

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
            self._take(rollout)

    def collect(self, ids: Collection[SampleId], may_fail: float | None = None) -> Mapping[SampleId, Outcome]:
        """Wait for outcomes, and return them in the order of `ids`; see `Scorer.collect`.

        Raises:
            RuntimeError: the scorer is closed, or was closed while this waited.
            BaseException: scoring raised it. The scorer cannot be used any more.
        """
        with self._changed:
            # Ctrl-C interrupts a wait without a timeout at once.
            wanted = set(ids)
            self._changed.wait_for(
                lambda: self._pending.isdisjoint(wanted) or self._closed or self._error is not None
            )
            if self._error is not None:
                raise self._error
            if self._closed:
                raise RuntimeError("the scorer is closed")
            self.busy_spans = [self._spans.pop(id) for id in ids]
            return {id: self._outcomes.pop(id) for id in ids}

    def is_scored(self, ids: Collection[SampleId]) -> bool:
        """See `Scorer.is_scored`."""
        with self._changed:
            return self._pending.isdisjoint(ids)

    def close(self) -> None:
        """Drop pending rollouts and end the thread; it has a second to do so and is then abandoned."""
        with self._changed:
            if not self._closed:
                self._closed = True
                self._end()
            self._changed.notify_all()
        self._thread.join(_CLOSING_SECONDS)

    @abstractmethod
    def _take(self, rollout: Rollout) -> None:
        """Queue a rollout for the thread; called with the lock."""

    @abstractmethod
    def _work(self) -> None:
        """Score rollouts until the scorer is closed; runs on the thread."""

    @abstractmethod
    def _end(self) -> None:
        """Make `_work` return; called once, with the lock."""

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # the waiting thread must see it, whatever it is
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _finish(self, id: SampleId, outcome: Outcome, span: Span) -> None:
        with self._changed:
            self._spans[id] = span
            self._outcomes[id] = outcome
            self._pending.discard(id)
            self._changed.notify_all()
        activity.advance()
