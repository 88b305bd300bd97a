"""Outcomes of scoring: a score, or a typed failure."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

FailureKind: TypeAlias = Literal[
    "transport",  # no connection, or it broke
    "timeout",  # no answer in time
    "overload",  # the server said it is busy (429, 503) until the retries ran out
    "bad_request",  # the server refused the sample (other 4xx)
    "bad_response",  # an invalid score: malformed, missing, NaN, infinite
    "server",  # the server failed (5xx)
    "function",  # a Python function raised, or returned no score
    "environment",  # what answers the model raised, hung, died, or answered garbage
]


@dataclass(frozen=True, slots=True)
class Scored:
    """A finite score, its parts (`components`) and further output of the scorer (`info`).

    Raises:
        ValueError: the score is not a finite number.
    """

    score: float
    components: Mapping[str, float] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not math.isfinite(self.score):
            raise ValueError(f"a score must be a finite number, not {self.score}")


@dataclass(frozen=True, slots=True)
class Failed:
    """No score after this number of attempts; `detail` is for humans, bounded, and holds no secret.

    `outage` says that the server was away or did not do its work, so that waiting for it may help; without it, the
    sample itself could not be scored.
    """

    kind: FailureKind
    attempts: int = 1
    detail: str = ""
    outage: bool = field(default=False, compare=False)


Outcome: TypeAlias = Scored | Failed
