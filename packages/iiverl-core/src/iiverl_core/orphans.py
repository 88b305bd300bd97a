"""End processes whose starter has died, even from SIGKILL."""

import fcntl
import os
import select
import signal
import sys
import threading


class Lifeline:
    """A pipe whose one end is open in this process only; give `fd` to a child, which calls `end_with`.

    The kernel closes this process's end when it dies.
    """

    def __init__(self) -> None:
        self.fd, self._held = os.pipe()  # neither is inherited unless a child is given it by name

    def close(self) -> None:
        """End all processes that hold on to this lifeline."""
        for fd in (self.fd, self._held):
            os.close(fd)


def end_with(fd: int) -> None:
    """End the group of this process, which it must lead, once the process that has the other end of `fd` is gone.

    On Linux the kernel sends SIGKILL, so that it ends within a call into C too, which may hold the interpreter's lock. On
    other systems a thread waits.
    """
    if sys.platform == "linux":
        fcntl.fcntl(fd, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_ASYNC)
        if select.select([fd], [], [], 0)[0]:  # gone before this was set up
            os.killpg(0, signal.SIGKILL)
    else:
        threading.Thread(target=_wait_and_end, args=(fd,), name="iiverl-lifeline", daemon=True).start()


def _wait_and_end(fd: int) -> None:
    os.read(fd, 1)
    os.killpg(0, signal.SIGKILL)
