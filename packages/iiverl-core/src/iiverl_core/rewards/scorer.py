"""The seam between the loop and what scores."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, TypeAlias

from iiverl_core.samples import Rollout, SampleId
from iiverl_reward_client import Outcome

Span: TypeAlias = tuple[float, float]
"""Start and end of something, in seconds of `time.monotonic`."""


class Scorer(Protocol):
    """Scores rollouts while others are still being generated."""

    @property
    def busy_spans(self) -> Sequence[Span]:
        """When the rollouts last collected were being scored; spans may overlap."""
        ...

    @property
    def busy_seconds(self) -> float:
        """Wall time in which at least one of the rollouts last collected was being scored: `covered(busy_spans)`."""
        ...

    def submit(self, rollout: Rollout) -> None:
        """Take one finished rollout and return at once.

        Raises:
            ValueError: a rollout of this id was submitted since the last `collect`.
        """
        ...

    def collect(self) -> Mapping[SampleId, Outcome]:
        """Wait for all that was submitted since the last call, and return an outcome for each.

        What breaks the scorer itself is raised here, and the scorer is of no more use then.
        """
        ...

    def close(self) -> None:
        """Free threads and connections; what was submitted and not collected is dropped."""
        ...


def covered(spans: Iterable[Span]) -> float:
    """Measure the union of spans of time, in seconds."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total
