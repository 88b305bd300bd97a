"""The lock on a run's folder, so that no two runs write to it."""

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from iiverl_core.errors import ConfigError, IIVerlError
from iiverl_core.telemetry.run_record import STALE_S, is_alive, process_start, read_run

LOCK_FILE = "run.lock"


@dataclass(frozen=True)
class Owner:
    """The process that the lock file names; `process_started` as in `RunRecord`."""

    pid: int
    host: str
    process_started: int | None

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class RunLock:
    """Holds a run's folder for the length of a `with` block; the folder is made, and removed again if it stays empty.

    The system releases the lock when the process ends, however it ends. A killed run leaves the file, which names it and
    is taken over; that is logged. On a file system without locks the file itself is the lock: its owner is asked for by
    process id on this machine, and judged by its heartbeat on another one.

    Raises:
        ConfigError: on entering, the folder cannot be written.
        IIVerlError: on entering, another run holds the folder.
    """

    def __init__(self, folder: Path, log: Callable[[str], None]) -> None:
        self._path, self._log = folder / LOCK_FILE, log

    def __enter__(self) -> Self:
        """Take the lock and write the owner."""
        folder = self._path.parent
        try:
            self._made = [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            while (descriptor := self._take()) is None:
                pass
        except OSError as error:
            self._remove_folders()
            raise ConfigError(
                f"trainer.default_local_dir: {folder} cannot be written: {error.strerror}."
            ) from error
        self._descriptor = descriptor
        return self

    def __exit__(self, *_: object) -> None:
        """Release the lock."""
        with suppress(OSError):
            self._path.unlink()
        os.close(self._descriptor)
        self._remove_folders()

    def _take(self) -> int | None:
        """Open and lock the file, and write the owner; None if the file has just been replaced or removed."""
        try:
            descriptor, new = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), True
        except FileExistsError:
            try:
                descriptor, new = os.open(self._path, os.O_RDWR), False
            except FileNotFoundError:
                return None
        owner, taken = _read_owner(descriptor), False
        try:
            if not self._lock(descriptor, owner, new=new):
                return None
            self._report(owner)
            _write_owner(descriptor)
            taken = True
            return descriptor
        finally:
            if not taken:
                os.close(descriptor)

    def _lock(self, descriptor: int, owner: Owner | None, *, new: bool) -> bool:
        """Lock the file; return whether it is still the one in the folder, and remove it if its owner is gone.

        Raises:
            IIVerlError: another run holds it.
        """
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # also held by what a killed run has left: processes that it had forked
            if owner is None or owner.host != socket.gethostname() or _lives(owner):
                raise self._in_use(owner) from None
        except OSError:  # a file system without locks
            if new:
                return True
            if owner is not None and self._may_live(owner):
                raise self._in_use(owner) from None
        else:
            return self._is_current(descriptor)
        self._report(owner)
        if self._is_current(descriptor):
            self._path.unlink(missing_ok=True)
        return False

    def _report(self, left: Owner | None) -> None:
        if left is not None:
            self._log(f"{self._path.parent} is taken over from {left}, which ended without releasing it")

    def _is_current(self, descriptor: int) -> bool:
        """Return whether an open file is the one in the folder."""
        try:
            return os.path.samestat(os.fstat(descriptor), self._path.stat())
        except FileNotFoundError:
            return False

    def _may_live(self, owner: Owner) -> bool:
        if owner.host == socket.gethostname():
            return _lives(owner)
        record = read_run(self._path.parent)
        if record and (record.pid, record.host) == (owner.pid, owner.host) and record.state() == "running":
            return True
        return time.time() - self._path.stat().st_mtime < STALE_S  # it may not have begun its record

    def _in_use(self, owner: Owner | None) -> IIVerlError:
        self._remove_folders()
        return IIVerlError(
            f"{self._path.parent} is in use by another run{f', {owner}' if owner else ''}. Wait for its end, or set "
            "trainer.default_local_dir or trainer.experiment_name."
        )

    def _remove_folders(self) -> None:
        """Remove the folders that were made, if nothing is in them."""
        with suppress(OSError):
            for folder in self._made:
                folder.rmdir()


def _read_owner(descriptor: int) -> Owner | None:
    try:
        return Owner(**json.loads(os.pread(descriptor, 4096, 0)))
    except (ValueError, TypeError):
        return None


def _write_owner(descriptor: int) -> None:
    owner = Owner(os.getpid(), socket.gethostname(), process_start(os.getpid()))
    with suppress(OSError):  # a full disk: the lock holds without the name
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(asdict(owner)).encode(), 0)


def _lives(owner: Owner) -> bool:
    return is_alive(owner.pid, owner.process_started)
