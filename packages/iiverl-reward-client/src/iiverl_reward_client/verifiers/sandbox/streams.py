"""Reading what other processes write, within bounds of time and size."""

import os
import selectors
import time
from typing import Literal, TypeAlias

Cut: TypeAlias = Literal["end", "time", "size"]

_CHUNK = 1 << 16


class Streams:
    """Pipes that other processes write to, read together into memory, each until its end."""

    def __init__(self, *pipes: int) -> None:
        self.read: dict[int, bytearray] = {pipe: bytearray() for pipe in pipes}
        self._selector = selectors.DefaultSelector()
        for pipe in pipes:
            self._selector.register(pipe, selectors.EVENT_READ)

    def close(self) -> None:
        """Give the selector back; the pipes stay the caller's."""
        self._selector.close()

    def read_line(self, pipe: int, deadline: float) -> None:
        """Read until `pipe` has given a line, all have ended, or it is `deadline` (of `time.monotonic`)."""
        while b"\n" not in self.read[pipe] and self._open and self._read_some(deadline):
            pass

    def read_until(self, deadline: float, counted: tuple[int, ...], most: int) -> Cut:
        """Read until all pipes end, the time is over, or `counted` together have given more than `most` bytes."""
        while self._open:
            in_time = self._read_some(deadline)
            if sum(len(self.read[pipe]) for pipe in counted) > most:
                return "size"
            if not in_time:
                return "time"
        return "end"

    @property
    def _open(self) -> bool:
        return bool(self._selector.get_map())

    def _read_some(self, deadline: float) -> bool:
        """Wait for output and read it; False when the time is over."""
        for key, _ in self._selector.select(max(0.0, deadline - time.monotonic())):
            chunk = os.read(key.fd, _CHUNK)
            if not chunk:
                self._selector.unregister(key.fd)
            self.read[key.fd] += chunk
        return time.monotonic() < deadline
