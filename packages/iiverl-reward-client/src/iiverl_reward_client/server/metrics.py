"""Prometheus metrics of the server."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from iiverl_reward_client.outcomes import Scored
from iiverl_reward_client.verifiers import VerifierError

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
_SCORES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


class Metrics:
    """The metrics of one server; `exposition` writes them as text."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "iiverl_reward_requests", "Answered requests.", ("path", "status"), registry=self._registry
        )
        self._scores = Histogram(
            "iiverl_reward_score", "Scores given.", ("type",), buckets=_SCORES, registry=self._registry
        )
        self._failures = Counter(
            "iiverl_reward_failures", "Samples without a score.", ("type", "kind"), registry=self._registry
        )
        self._seconds = Histogram(
            "iiverl_reward_seconds",
            "From a sample's arrival to its result, waiting included.",
            ("type",),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._in_flight = Gauge(
            "iiverl_reward_in_flight", "Samples being verified.", ("type",), registry=self._registry
        )
        self._waiting = Gauge(
            "iiverl_reward_waiting", "Samples waiting for a place.", ("type",), registry=self._registry
        )

    def watch(self, type: str, in_flight: Callable[[], float], waiting: Callable[[], float]) -> None:
        """Report the samples in flight and waiting for a type from these functions."""
        self._in_flight.labels(type).set_function(in_flight)
        self._waiting.labels(type).set_function(waiting)

    def count(self, type: str, result: Scored | VerifierError, seconds: float) -> None:
        """Count a sample's result; `type` is a known type or `unknown`."""
        if isinstance(result, Scored):
            self._scores.labels(type).observe(result.score)
        else:
            self._failures.labels(type, result.kind).inc()
        self._seconds.labels(type).observe(seconds)

    def exposition(self) -> bytes:
        """Write the metrics in Prometheus's text format."""
        return generate_latest(self._registry)
