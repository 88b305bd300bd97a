"""A request to end a run: after the current step if it can be saved, else at once."""

from collections.abc import Iterator
from contextlib import contextmanager


class Stop:
    """Set by a signal's handler, and read by the loop between its steps."""

    def __init__(self) -> None:
        self.requested = False
        self._heeded = False

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """Within the block, a request ends the run after the current step, with a checkpoint."""
        self._heeded = True
        try:
            yield
        finally:
            self._heeded = False

    def request(self) -> bool:
        """Ask the run to end after its current step; false if nothing would come of that, so that it has to be ended."""
        if not self._heeded or self.requested:
            return False
        self.requested = True
        return True
