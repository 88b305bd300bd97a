"""A part of a step, and how far it is."""

import time

from iiverl_core.telemetry.timers import duration


class Phase:
    """A part of a step, such as generation: how many of its `total` items are done, and how many tokens."""

    def __init__(self, name: str, total: int | None = None) -> None:
        self.name, self.total = name, total
        self.done = self.tokens = 0
        self.started = time.perf_counter()

    def advance(self, n: int = 1, tokens: int = 0) -> None:
        """Count `n` items more, and the tokens in them."""
        self.done += n
        self.tokens += tokens

    def describe(self) -> str:
        """Say how far it is: `384/512  12.3k tok/s  20s`."""
        seconds = time.perf_counter() - self.started
        parts = [f"{self.done}/{self.total}"] if self.total else [str(self.done)] if self.done else []
        if self.tokens and seconds > 0:
            parts.append(f"{short(self.tokens / seconds)} tok/s")
        return "  ".join([*parts, duration(seconds)])


def short(x: float) -> str:
    """Write a count in few characters: `950`, `12.3k`, `1.2M`."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if x >= size:
            return f"{x / size:.1f}{unit}"
    return f"{x:.0f}"
