"""One server as the client sees it: whether it can be used, how many requests it bears, what protocol it speaks.

A server that keeps failing is set aside. When its time is over it is probed, and a probe that is answered lets one
request through; only when that succeeds is the server in full use again.
"""

import math
import random
from dataclasses import dataclass
from typing import Literal

from iiverl_reward_client.addresses import Address
from iiverl_reward_client.dialects import Capabilities, Dialect
from iiverl_reward_client.outcomes import Failed


@dataclass(frozen=True, slots=True)
class Breaker:
    """When a server is set aside: after so many `failures` in a row, of those that are worth a retry.

    It is probed again after about `seconds`, twice as many each further time, `longest` at most.
    """

    failures: int = 5
    seconds: float = 1.0
    longest: float = 30.0

    def __post_init__(self) -> None:
        for name in ("failures", "seconds", "longest"):
            if not getattr(self, name) > 0:
                raise ValueError(f"Breaker.{name} must be positive")


@dataclass(frozen=True, slots=True)
class RequestPermit:
    """One request under way: when it was sent, and before which change of the server's state."""

    sent: float
    epoch: int


class Endpoint:
    """A server's state. Times are the event loop's, in seconds."""

    def __init__(self, address: Address, breaker: Breaker, dialect: Dialect | None) -> None:
        self.address = address
        self.dialect = dialect
        self.capabilities: Capabilities | None = None
        self.in_flight = 0
        self.last_used = -math.inf
        self.last_failure: Failed | None = None
        self.probing = False
        self.state: Literal["unknown", "closed", "open", "trial"] = "closed" if dialect else "unknown"
        self._breaker = breaker
        self._failures = 0  # in a row
        self._openings = 0  # in a row, without a success between
        self._retry_at = 0.0
        self._paused_until = 0.0
        self._limit = math.inf
        self._lowered_at = -math.inf
        self._epoch = 0

    def room(self, now: float, max_workers: int) -> int:
        """Say how many more requests the server may be sent."""
        if self.state in ("unknown", "open") or now < self._paused_until:
            return 0
        most = 1 if self.state == "trial" else int(min(self._limit, max_workers))
        return max(0, most - self.in_flight)

    def in_use(self, now: float) -> bool:
        """Say whether the server takes requests, if perhaps no more than it has now."""
        return self.state == "closed" and now >= self._paused_until

    def wants_probe(self, now: float) -> bool:
        """Say whether it is time to look whether the server is there."""
        return not self.probing and self.state in ("unknown", "open") and now >= self.wakes_at()

    def wakes_at(self) -> float:
        """Give the time at which the server can be looked at again; in the past for one in use."""
        return max(self._paused_until, self._retry_at if self.state == "open" else 0.0)

    def begin(self, now: float) -> RequestPermit:
        """Note that a request is sent."""
        self.in_flight += 1
        self.last_used = now
        return RequestPermit(now, self._epoch)

    def succeeded(self, permit: RequestPermit, max_workers: int) -> None:
        """Note an answer that shows the server at work; it may bear a little more."""
        if permit.epoch != self._epoch:
            return
        if self.state == "trial":
            self._enter("closed")
        self._failures = self._openings = 0
        self._limit += 1.0 / self._limit
        if self._limit >= max_workers:
            self._limit = math.inf

    def failed(self, permit: RequestPermit, now: float, failure: Failed) -> None:
        """Note that the server failed; set it aside if it keeps doing so."""
        if permit.epoch != self._epoch:
            return
        self.last_failure = failure
        self._failures += 1
        if self.state == "trial" or self._failures >= self._breaker.failures:
            self._set_aside(now)

    def slow_down(self, permit: RequestPermit, now: float, max_workers: int) -> None:
        """Note that the server cannot keep up: from now on half as many requests at a time.

        Requests that were under way when it was first told say nothing new.
        """
        if permit.sent >= self._lowered_at:
            self._limit = max(1.0, min(self._limit, max_workers) / 2)
            self._lowered_at = now

    def pause(self, until: float) -> None:
        """Send nothing until then."""
        self._paused_until = max(self._paused_until, until)

    def found(self, dialect: Dialect, capabilities: Capabilities | None) -> None:
        """Note that a probe was answered."""
        self.dialect, self.capabilities = dialect, capabilities
        self._enter("closed" if self.state == "unknown" else "trial")

    def missed(self, now: float, failure: Failed) -> None:
        """Note that a probe failed."""
        self.last_failure = failure
        self._set_aside(now)

    def _set_aside(self, now: float) -> None:
        seconds = min(self._breaker.longest, self._breaker.seconds * 2.0 ** min(self._openings, 60))
        # Clients that lost the server together should not all come back together.
        self._retry_at = now + seconds * random.uniform(0.5, 1.0)
        self._openings += 1
        self._enter("open")

    def _enter(self, state: Literal["closed", "open", "trial"]) -> None:
        self.state = state
        self._failures = 0
        self._epoch += 1
