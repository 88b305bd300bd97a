"""Interrupt engines while they generate: the driver names a call, and the processes in that call look for it.

The flags travel through a `TCPStore` on the driver's machine, since a process in a call answers no other one.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

LOOK_S = 0.02  # between two looks for an interruption
LOOK_STEPS = 16  # the same, in steps of an engine that is spread over several processes
AGREE_TIMEOUT = timedelta(seconds=60)  # for the first process of an engine to say what it saw


@dataclass(frozen=True)
class InterruptionAddress:
    """Where processes look for interruptions."""

    host: str
    port: int


class Interrupter:
    """The driver's end."""

    def __init__(self, host: str) -> None:
        """Listen on `host`, a name of this machine that the others can reach."""
        self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        self.address = InterruptionAddress(host, self._store.port)

    def interrupt(self, call: int) -> None:
        """Interrupt all processes that are in a call or come to it."""
        self._store.set(f"call {call}", "interrupted")


class Interruptions:
    """The end of a process that generates, `rank` of the `size` processes that an engine is spread over."""

    def __init__(self, address: InterruptionAddress, engine: int, rank: int, size: int) -> None:
        self._store = TCPStore(address.host, address.port, is_master=False, wait_for_workers=False)
        self._engine, self._rank, self._size = engine, rank, size

    def of_call(self, call: int) -> Callable[[], bool]:
        """Return a function that says, before each step of the engine, whether a call is interrupted.

        All processes of an engine get the same answer at the same step: the first one looks, and the others learn what it
        saw.
        """
        if self._size > 1:
            return self._agreed(f"call {call}", f"engine {self._engine}, call {call}")
        last = time.monotonic()

        def interrupted() -> bool:
            nonlocal last
            if (now := time.monotonic()) - last < LOOK_S:
                return False
            last = now
            return self._store.check([f"call {call}"])

        return interrupted

    def _agreed(self, flag: str, name: str) -> Callable[[], bool]:
        steps = 0

        def interrupted() -> bool:
            nonlocal steps
            steps += 1
            if steps % LOOK_STEPS:
                return False
            key = f"{name}, step {steps}"
            if self._rank == 0:
                self._store.set(key, str(int(self._store.check([flag]))))
            else:
                self._store.wait([key], AGREE_TIMEOUT)
            return self._store.get(key) == b"1"

        return interrupted
