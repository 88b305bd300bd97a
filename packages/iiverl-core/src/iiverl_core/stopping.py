"""A request to end a run: after the current step if it can be saved, else at once; and what it must not interrupt."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Stop:
    """Set by a signal's handler, and read by the loop between its steps."""

    def __init__(self) -> None:
        self.exit_code = 0
        self._heeded = False

    @property
    def requested(self) -> bool:
        """Whether the run is to end after the current step."""
        return self.exit_code != 0

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """Within the block, a request ends the run after the current step, with a checkpoint."""
        self._heeded = True
        try:
            yield
        finally:
            self._heeded = False

    def request(self, exit_code: int) -> bool:
        """Ask the run to end after its current step with this exit code.

        Returns:
            False if nobody heeds it, or it was requested before: whoever asks has to end the run.
        """
        if not self._heeded or self.requested:
            return False
        self.exit_code = exit_code
        return True


@contextmanager
def undisturbed() -> Iterator[None]:
    """Ignore Ctrl-C in this context."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
