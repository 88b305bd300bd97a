"""The lock on a run's folder, so that no two runs write to it."""

import fcntl
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from iiverl_core.errors import IIVerlError

LOCK_FILE = "run.lock"


class RunLock:
    """Holds a run's folder for the length of a `with` block.

    The system releases the lock when the process ends, however it ends. The file names the owner; a name that is left in
    it belongs to a process that was killed, which is logged. On a file system without locks, nothing is held.

    Raises:
        IIVerlError: on entering, another process holds the folder, on this machine or, if the file system shares its
            locks, on another one.
    """

    def __init__(self, folder: Path, log: Callable[[str], None]) -> None:
        self._folder, self._log = folder, log

    def __enter__(self) -> Self:
        """Take the lock and write the owner."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file = (self._folder / LOCK_FILE).open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = self._owner()
            self._file.close()
            raise IIVerlError(
                f"{self._folder} is in use by another run{f', {owner}' if owner else ''}. Wait for its end, or set "
                "trainer.default_local_dir or trainer.experiment_name."
            ) from None
        except OSError:  # a file system without locks
            pass
        if left := self._owner():
            self._log(f"{self._folder} is taken over from {left}, which ended without releasing it")
        self._write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        return self

    def __exit__(self, *_: object) -> None:
        """Release the lock."""
        self._write("")
        self._file.close()

    def _owner(self) -> str:
        """Describe the process that the file names; empty if it names none."""
        self._file.seek(0)
        try:
            owner: dict[str, Any] = json.loads(self._file.read())
            return f"process {owner['pid']} on {owner['host']}"
        except (ValueError, KeyError, TypeError):
            return ""

    def _write(self, text: str) -> None:
        try:
            self._file.truncate(0)
            self._file.write(text)
            self._file.flush()
        except OSError:  # a full disk: the lock holds without the name
            pass
