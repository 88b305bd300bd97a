"""When a failed request is tried again: full jitter, `Retry-After`, and a bound over the whole batch."""

import math
import random
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds that things may take.

    `connect`: until a connection stands. `read`: from there to the end of the answer. `sample`: for one sample from
    its first request on, retries and waiting for a server to come back included; also the longest that samples wait
    while no server can be used.
    """

    connect: float = 5.0
    read: float = 30.0
    sample: float = 300.0

    def __post_init__(self) -> None:
        for name in ("connect", "read", "sample"):
            if not getattr(self, name) > 0:
                raise ValueError(f"the timeout {name!r} is a positive number of seconds")


@dataclass(frozen=True, slots=True)
class Retries:
    """How often and how soon a sample is sent again after a transport failure, a timeout, 408, 429 or 5xx.

    `limit` retries a sample at most, the n-th after a random time between 0 and `first_delay * factor**(n-1)` seconds,
    `longest_delay` at most (full jitter). Over a whole batch there are at most `floor + share * samples` of them, so
    that an outage does not become a storm. A batch is what is scored from one moment of rest to the next.
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
        """Draw the seconds to wait before the `retry`-th retry, counted from 1."""
        try:
            bound = self.first_delay * self.factor ** (retry - 1)
        except OverflowError:
            bound = math.inf
        return random.uniform(0.0, min(self.longest_delay, bound))


class RetryBudget:
    """Counts the retries that a batch has left."""

    def __init__(self, retries: Retries) -> None:
        self._retries = retries
        self._left = float(retries.floor)

    def add_sample(self) -> None:
        """Allow for one sample more."""
        self._left += self._retries.share

    def spend(self) -> bool:
        """Take one retry, if there is one left."""
        if self._left < 1:
            return False
        self._left -= 1
        return True

    def reset(self) -> None:
        """Begin a new batch."""
        self._left = float(self._retries.floor)


def retry_after(header: str | None) -> float | None:
    """Read `Retry-After`, seconds or an HTTP date, as seconds from now; None where there is none that can be read."""
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
