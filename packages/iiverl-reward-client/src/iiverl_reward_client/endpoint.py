"""The client's view of a server: whether it is available, its concurrency limit and its protocol.

The breaker opens for a server that keeps failing. After a while the server is probed; if it answers, one request is
let through, and if that succeeds, the server is in full use again.
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
    """Stops using a server after `failures` retryable failures in a row.

    The server is probed after about `seconds`; this doubles each further time, up to `longest`.
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
    """A request in flight: when it was sent, and the epoch of the server's state then."""

    sent: float
    epoch: int


class Endpoint:
    """The state of a server. Times are the event loop's, in seconds."""

    def __init__(self, address: Address, breaker: Breaker, dialect: Dialect | None) -> None:
        self.address = address
        self.dialect = dialect
        self.capabilities: Capabilities | None = None
        self.in_flight = 0
        self.last_used = -math.inf
        self.last_success = -math.inf
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
        """Return how many more requests may be sent to the server."""
        if self.state in ("unknown", "open") or now < self._paused_until:
            return 0
        most = 1 if self.state == "trial" else int(min(self._limit, max_workers))
        return max(0, most - self.in_flight)

    def in_use(self, now: float) -> bool:
        """Return whether the server accepts requests, even if it is at its limit."""
        return self.state == "closed" and now >= self._paused_until

    def wants_probe(self, now: float) -> bool:
        """Return whether it is time to probe the server."""
        return not self.probing and self.state in ("unknown", "open") and now >= self.wakes_at()

    def wakes_at(self) -> float:
        """Return the time of the next possible use or probe; in the past for a server in use."""
        return max(self._paused_until, self._retry_at if self.state == "open" else 0.0)

    def begin(self, now: float) -> RequestPermit:
        """Record that a request is sent."""
        self.in_flight += 1
        self.last_used = now
        return RequestPermit(now, self._epoch)

    def succeeded(self, permit: RequestPermit, max_workers: int) -> None:
        """Record a response that shows the server is up, and raise its limit slightly."""
        if permit.epoch != self._epoch:
            return
        if self.state == "trial":
            self._enter("closed")
        self._failures = self._openings = 0
        self._limit += 1.0 / self._limit
        if self._limit >= max_workers:
            self._limit = math.inf

    def failed(self, permit: RequestPermit, now: float, failure: Failed) -> None:
        """Record a failure; open the breaker after several."""
        if permit.epoch != self._epoch:
            return
        self.last_failure = failure
        self._failures += 1
        if self.state == "trial" or self._failures >= self._breaker.failures:
            self._open_breaker(now)

    def slow_down(self, permit: RequestPermit, now: float, max_workers: int) -> None:
        """Halve the concurrency limit of an overloaded server, once for all requests in flight at that time."""
        if permit.sent >= self._lowered_at:
            self._limit = max(1.0, min(self._limit, max_workers) / 2)
            self._lowered_at = now

    def pause(self, until: float) -> None:
        """Send nothing until this time."""
        self._paused_until = max(self._paused_until, until)

    def found(self, dialect: Dialect, capabilities: Capabilities | None) -> None:
        """Record an answered probe."""
        self.dialect, self.capabilities = dialect, capabilities
        self._enter("closed" if self.state == "unknown" else "trial")

    def missed(self, now: float, failure: Failed) -> None:
        """Record a failed probe."""
        self.last_failure = failure
        self._open_breaker(now)

    def _open_breaker(self, now: float) -> None:
        seconds = min(self._breaker.longest, self._breaker.seconds * 2.0 ** min(self._openings, 60))
        # Clients that lost the server at the same time should not all return at once.
        self._retry_at = now + seconds * random.uniform(0.5, 1.0)
        self._openings += 1
        self._enter("open")

    def _enter(self, state: Literal["closed", "open", "trial"]) -> None:
        self.state = state
        self._failures = 0
        self._epoch += 1
