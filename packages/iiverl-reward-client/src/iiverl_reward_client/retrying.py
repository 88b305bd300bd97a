"""Retry policy: full jitter, `Retry-After`, and a limit for the whole batch."""

import math
import random
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Timeouts in seconds.

    `connect`: to open a connection. `read`: from then to the end of the response. `sample`: for one sample from its
    first request on, including retries and waiting for a server; also the longest that samples wait while no server can
    be used.
    """

    connect: float = 5.0
    read: float = 30.0
    sample: float = 300.0

    def __post_init__(self) -> None:
        for name in ("connect", "read", "sample"):
            if not getattr(self, name) > 0:
                raise ValueError(f"the timeout {name!r} must be a positive number of seconds")


@dataclass(frozen=True, slots=True)
class Retries:
    """How often and how soon a sample is sent again after a transport failure, a timeout, 408, 429 or 5xx.

    A sample has at most `limit` retries, the n-th after a random time between 0 and `first_delay * factor**(n-1)`
    seconds, at most `longest_delay` (full jitter). A whole batch has at most `floor + share * samples` retries, so that
    an outage does not cause a storm. A batch ends when no sample is pending.
    """

    limit: int = 5
    first_delay: float = 0.5
    longest_delay: float = 10.0
    factor: float = 2.0
    share: float = 1.0
    floor: int = 20

    def __post_init__(self) -> None:
        for name in ("limit", "first_delay", "longest_delay", "factor", "share", "floor"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"Retries.{name} must not be negative")

    def delay(self, retry: int) -> float:
        """Draw the delay in seconds before the `retry`-th retry, counted from 1."""
        try:
            bound = self.first_delay * self.factor ** (retry - 1)
        except OverflowError:
            bound = math.inf
        return random.uniform(0.0, min(self.longest_delay, bound))


class RetryBudget:
    """Counts the remaining retries of a batch."""

    def __init__(self, retries: Retries) -> None:
        self._retries = retries
        self._left = float(retries.floor)

    def add_sample(self) -> None:
        """Add the share of one sample."""
        self._left += self._retries.share

    def spend(self) -> bool:
        """Use a retry if one is left; return whether it was."""
        if self._left < 1:
            return False
        self._left -= 1
        return True

    def reset(self) -> None:
        """Start a new batch."""
        self._left = float(self._retries.floor)


def retry_after(header: str | None) -> float | None:
    """Parse `Retry-After`, seconds or an HTTP date, as seconds from now; None if it is missing or invalid."""
    if header is None:
        return None
    text = header.strip()
    try:
        seconds = float(text)
    except ValueError:
        try:
            moment = parsedate_to_datetime(text)
        except ValueError:
            return None
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        seconds = (moment - datetime.now(UTC)).total_seconds()
    return max(0.0, seconds) if math.isfinite(seconds) else None
