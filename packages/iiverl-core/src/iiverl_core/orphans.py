"""End processes whose starter has died, even from SIGKILL.

A child that is ours ends itself (`end_with`). Processes of other programs are ended by one more process, which runs this
file (`Lifeline.end_marked`).
"""

import fcntl
import os
import select
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

_GRACE_S = 5.0  # for marked processes to end by themselves
_LOOK_S = 0.2
_LOOK_BEFORE_S = 2.0  # while the starter lives: its descendants' parents may die together with it


class Lifeline:
    """A pipe whose one end is open in this process only; give `fd` to a child, which calls `end_with`.

    The kernel closes this process's end when it dies.
    """

    def __init__(self) -> None:
        self.fd, self._held = os.pipe()  # neither is inherited unless a child is given it by name

        self._ender: subprocess.Popen[bytes] | None = None

    def close(self) -> None:
        """End all processes that hold on to this lifeline, and wait for those that `end_marked` ends."""
        for fd in (self.fd, self._held):
            os.close(fd)
        if self._ender is not None:
            self._ender.wait()

    def end_marked(self, marker: str) -> None:
        """Let a process end all those that have `marker`, `NAME=value`, in their environment, and their descendants.

        They have some seconds to end by themselves. Works on Linux only, by /proc.
        """
        self._ender = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, str(self.fd), marker],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={},
            pass_fds=(self.fd,),
            start_new_session=True,  # a closed terminal or Ctrl-C must not end it before the others
        )


def end_with(fd: int) -> None:
    """End the group of this process, which it must lead, once the process that has the other end of `fd` is gone.

    On Linux the kernel sends SIGKILL, so that it ends within a call into C too, which may hold the interpreter's lock. On
    other systems a thread waits.
    """
    if sys.platform == "linux":
        fcntl.fcntl(fd, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_ASYNC)
        if _is_over(fd, 0):  # before this was set up
            os.killpg(0, signal.SIGKILL)
    else:
        threading.Thread(target=_wait_and_end, args=(fd,), name="iiverl-lifeline", daemon=True).start()


def _is_over(fd: int, patience_s: float) -> bool:
    """Wait for the end of a lifeline; `fd` may be any number, which `select` does not take."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(1000 * patience_s))


def _wait_and_end(fd: int) -> None:
    os.read(fd, 1)
    os.killpg(0, signal.SIGKILL)


def _wait_and_end_marked(fd: int, marker: str) -> None:
    known: dict[int, int] = {}
    while not _is_over(fd, _LOOK_BEFORE_S):
        known = _marked(marker.encode(), known)
    deadline = time.monotonic() + _GRACE_S
    while known := _marked(marker.encode(), known):
        if time.monotonic() > deadline:
            for pid in known:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(_LOOK_S)


def _marked(marker: bytes, known: dict[int, int]) -> dict[int, int]:
    """Return this user's processes with a marker in their environment, their descendants, and those `known` that live.

    A process that changes its title may overwrite its environment, as Ray's workers do, but it is the child of one that
    does not; once that has ended, it is only `known`. Values are the times when the processes started, by which they are
    told from others that get their numbers.
    """
    parents: dict[int, int] = {}
    started: dict[int, int] = {}
    found: set[int] = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            state, parent, *fields = (process / "stat").read_text().rpartition(") ")[2].split()
            if state == "Z":
                continue
            pid = int(process.name)
            parents[pid], started[pid] = int(parent), int(fields[17])
            if marker in (process / "environ").read_bytes().split(b"\0"):
                found.add(pid)
        except OSError:  # it ended, or is somebody else's
            pass
    found |= {pid for pid, start in known.items() if started.get(pid) == start}
    added = found
    while added:
        added = {pid for pid, parent in parents.items() if parent in added} - found
        found |= added
    return {pid: started[pid] for pid in found}


if __name__ == "__main__":
    _wait_and_end_marked(int(sys.argv[1]), sys.argv[2])
