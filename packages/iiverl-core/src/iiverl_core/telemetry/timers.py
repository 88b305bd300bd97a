"""How long things take, and how a time is written for a person."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Timers:
    """Wall-clock seconds of the parts of a step, by the names of the metrics `timing_s/…`.

    Parts may lie inside each other; a part that is timed more than once in a step is added up.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the time that the block takes, also if it raises, to `timing_s/{name}`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            key = f"timing_s/{name}"
            self._seconds[key] = self._seconds.get(key, 0.0) + time.perf_counter() - start

    def drain(self) -> dict[str, float]:
        """Return the times measured since the last call, and reset them."""
        seconds, self._seconds = self._seconds, {}
        return seconds


def duration(seconds: float) -> str:
    """Write a duration in at most two units: `8s`, `1m12s`, `3h05m`, `2d04h`."""
    whole = max(0, round(seconds))
    minutes, s = divmod(whole, 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d{h:02d}h"
    if hours:
        return f"{hours}h{m:02d}m"
    return f"{minutes}m{s:02d}s" if minutes else f"{s}s"
