"""Record what this process is doing: the call that it is in, and a count that grows while it makes progress.

There is one such record per process. Whoever gets something done advances the count; a watchdog compares counts.
"""

import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

OWN_THREADS = ("MainThread", "iiverl-rollouts", "iiverl-rewards")  # which do the work of a run
STANDARD_LIBRARY = sysconfig.get_path("stdlib")


@dataclass(frozen=True)
class Activity:
    """The innermost call (None between calls), the monotonic time of its start, and a count of what was done so far."""

    call: str | None = None
    since: float = 0.0
    count: int = 0


_current = Activity()
_calls: list[Activity] = []  # those that are open, of any thread
_lock = threading.Lock()


def advance() -> None:
    """Count progress of any kind: a micro-batch, an engine step, an outcome, the result of a call."""
    global _current
    with _lock:
        _current = replace(_current, count=_current.count + 1)


@contextmanager
def call(name: str) -> Iterator[None]:
    """Name what the block does; its start and its end are progress."""
    own = Activity(name, time.monotonic())
    with _lock:
        _calls.append(own)
        _show_innermost()
    try:
        yield
    finally:
        with _lock:
            _calls[:] = [each for each in _calls if each is not own]
            _show_innermost()


def _show_innermost() -> None:
    global _current
    innermost = _calls[-1] if _calls else Activity()
    _current = replace(innermost, count=_current.count + 1)


def current() -> Activity:
    """Return what this process is doing now."""
    return _current


def stacks() -> str:
    """Format the stacks of all Python threads of this process, the innermost call last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"thread {names.get(ident, ident)}\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
    )


def innermost() -> list[str]:
    """Locate the threads that do a run's work, each by its innermost call outside Python's own library."""
    frames = sys._current_frames()
    idents = {thread.name: thread.ident for thread in threading.enumerate()}
    places: list[str] = []
    for name in OWN_THREADS:
        frame = frames.get(idents.get(name) or 0)
        while frame is not None and Path(frame.f_code.co_filename).is_relative_to(STANDARD_LIBRARY):
            frame = frame.f_back
        if frame is not None:
            places.append(f"{name} in {frame.f_code.co_name}, {frame.f_code.co_filename}:{frame.f_lineno}")
    return places
