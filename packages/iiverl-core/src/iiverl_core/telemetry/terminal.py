"""Find out what a terminal can draw, and whether this process is reading input from it."""

import builtins
import os
import sys
import termios
import threading
import time
from collections.abc import Callable
from typing import TextIO

QUIET_SECONDS = 0.7  # after an input, when a debugger may ask for the next one


def takes_escape_codes(stream: TextIO) -> bool:
    """Return whether `stream` is a terminal that is not `dumb`, and `NO_COLOR` is not set."""
    known = os.environ.get("TERM", "") not in ("", "dumb")
    return stream.isatty() and known and not os.environ.get("NO_COLOR")


class InputWatcher:
    """Notices when something in this process reads input: `input()`, and so pdb, and editors that read keys.

    `before` is called before `input()` writes its prompt, on the same thread. `breakpoint()` is not wrapped, since pdb
    would stop in the wrapper's frame.
    """

    def __init__(self, before: Callable[[], None]) -> None:
        self._before = before
        self._lock = threading.Lock()
        self._reading = 0
        self._quiet_until = 0.0
        self._read_keys_before = False
        self._original = builtins.input
        self._replacement = self._input

    def start(self) -> None:
        """Start watching."""
        self._read_keys_before = _reads_keys()
        self._original, builtins.input = builtins.input, self._replacement

    def stop(self) -> None:
        """Restore `input`, unless something else has replaced it since."""
        if builtins.input is self._replacement:
            builtins.input = self._original

    def pending(self) -> bool:
        """Return whether input is being read, or was a moment ago."""
        return (
            self._reading > 0
            or time.monotonic() < self._quiet_until
            or (_reads_keys() and not self._read_keys_before)
        )

    def _input(self, *arguments: object) -> str:
        with self._lock:
            self._reading += 1
        try:
            self._before()
            return self._original(*arguments)
        finally:
            self._quiet_until = time.monotonic() + QUIET_SECONDS
            with self._lock:
                self._reading -= 1


def _reads_keys() -> bool:
    """Return whether the terminal passes on each key rather than whole lines."""
    try:
        return not termios.tcgetattr(sys.__stdin__)[3] & termios.ICANON  # type: ignore[arg-type]
    except (termios.error, TypeError, ValueError, OSError):  # no terminal or no standard input
        return False
