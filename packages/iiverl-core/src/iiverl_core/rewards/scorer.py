"""The interface between the training loop and scoring."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Protocol, TypeAlias

from iiverl_core.samples import Rollout, SampleId
from iiverl_reward_client import Outcome

Span: TypeAlias = tuple[float, float]
"""Start and end in seconds of `time.monotonic`."""


class Scorer(Protocol):
    """Scores rollouts while others are still being generated."""

    @property
    def busy_spans(self) -> Sequence[Span]:
        """When the last collected rollouts were being scored; spans may overlap."""
        ...

    @property
    def busy_seconds(self) -> float:
        """Wall time in which at least one of them was being scored: `covered(busy_spans)`."""
        ...

    def submit(self, rollout: Rollout) -> None:
        """Queue a finished rollout and return immediately.

        Raises:
            ValueError: a rollout with this id was submitted and is not collected yet.
        """
        ...

    def collect(self, ids: Collection[SampleId], may_fail: float | None = None) -> Mapping[SampleId, Outcome]:
        """Wait for the outcomes of these rollouts, which were submitted; others may still be submitted meanwhile.

        `may_fail` of them may be left without a score; by default, the fraction that the configuration allows.

        An error of the scorer itself is raised here, and the scorer cannot be used any more.
        """
        ...

    def is_scored(self, ids: Collection[SampleId]) -> bool:
        """Return whether `collect` would have nothing to wait for."""
        ...

    def close(self) -> None:
        """Free threads and connections, and drop pending rollouts."""
        ...


def covered(spans: Iterable[Span]) -> float:
    """Return the length of the union of time spans, in seconds."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total
