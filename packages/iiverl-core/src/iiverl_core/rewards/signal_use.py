"""Noticing a user's function that sets a signal handler, which Python allows on the main thread only."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def noticed_signal_use() -> Iterator[list[str]]:
    """Fill the list that it gives with the threads, other than the main one, that call `signal.signal` meanwhile.

    Timeouts made of signals, as Math-Verify has by default, raise ValueError there; libraries that catch it answer
    "not equal", which would be scored as 0 like any wrong answer. So the call itself has to be seen.
    """
    threads: list[str] = []
    set_handler = signal.signal

    def noticing(*args: Any, **kwargs: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            threads.append(threading.current_thread().name)
        return set_handler(*args, **kwargs)

    signal.signal = noticing
    try:
        yield threads
    finally:
        signal.signal = set_handler
