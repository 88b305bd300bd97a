"""Measure how long things take, and format durations and counts."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class Timers:
    """Wall-clock seconds of the parts of a step, by their metric names `timing_s/…`.

    Parts may be nested; times of the same part are added up.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the time of the block, even if it raises, to `timing_s/{name}`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add({f"timing_s/{name}": time.perf_counter() - start})

    def add(self, seconds: Mapping[str, float]) -> None:
        """Add times that were measured elsewhere, by metric name."""
        for key, each in seconds.items():
            self._seconds[key] = self._seconds.get(key, 0.0) + each

    def drain(self) -> dict[str, float]:
        """Return and reset the times measured since the last call."""
        seconds, self._seconds = self._seconds, {}
        return seconds


def duration(seconds: float) -> str:
    """Format a duration in at most two units: `8s`, `1m12s`, `3h05m`, `2d04h`."""
    whole = max(0, round(seconds))
    minutes, s = divmod(whole, 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d{h:02d}h"
    if hours:
        return f"{hours}h{m:02d}m"
    return f"{minutes}m{s:02d}s" if minutes else f"{s}s"


class Phase:
    """A part of a step, such as generation, with counts of its `total` items and tokens done."""

    def __init__(self, name: str, total: int | None = None) -> None:
        self.name, self.total = name, total
        self.done = self.tokens = 0
        self.started = time.perf_counter()

    def advance(self, n: int = 1, tokens: int = 0) -> None:
        """Count `n` more items and their tokens."""
        self.done += n
        self.tokens += tokens

    def describe(self) -> str:
        """Describe the progress: `384/512  12.3k tok/s  20s`."""
        seconds = time.perf_counter() - self.started
        parts = [f"{self.done}/{self.total}"] if self.total else [str(self.done)] if self.done else []
        if self.tokens and seconds > 0:
            parts.append(f"{short(self.tokens / seconds)} tok/s")
        return "  ".join([*parts, duration(seconds)])


def short(x: float) -> str:
    """Format a count briefly: `950`, `12.3k`, `1.2M`."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if x >= size:
            return f"{x / size:.1f}{unit}"
    return f"{x:.0f}"
