"""What the terminal can draw, and whether something in this process is reading input from it."""

import builtins
import os
import sys
import termios
import threading
import time
from collections.abc import Callable
from typing import TextIO

QUIET_SECONDS = 0.7  # after an answer, in which a debugger asks the next question


def takes_escape_codes(stream: TextIO) -> bool:
    """Tell whether `stream` is a terminal that is not `dumb`, and the user has not set `NO_COLOR`."""
    known = os.environ.get("TERM", "") not in ("", "dumb")
    return stream.isatty() and known and not os.environ.get("NO_COLOR")


class InputWatcher:
    """Knows while something in this process reads an answer: `input()` and with it pdb, and editors that read keys.

    `before` is called before `input()` writes its prompt, from the thread that asks. `breakpoint()` stays as it is: a
    function around it would be the frame in which pdb stops.
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
        """Begin to notice."""
        self._read_keys_before = _reads_keys()
        self._original, builtins.input = builtins.input, self._replacement

    def stop(self) -> None:
        """Give `input` back, unless somebody else has replaced it since."""
        if builtins.input is self._replacement:
            builtins.input = self._original

    def pending(self) -> bool:
        """Tell whether an answer is being read, or was a moment ago."""
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
    """Tell whether the terminal gives a program each key at once, and not whole lines."""
    try:
        return not termios.tcgetattr(sys.__stdin__)[3] & termios.ICANON  # type: ignore[arg-type]
    except (termios.error, TypeError, ValueError, OSError):  # no terminal, or no standard input at all
        return False
