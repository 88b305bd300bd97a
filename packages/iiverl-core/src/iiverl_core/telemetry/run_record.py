"""The file `run.json` in a run's folder: where the run lives, whether it still does, and how it ended.

The run writes it itself: when it starts, every half minute from a thread, and when it ends. A run that is killed cannot
write its end, so its state is judged by the process and by the age of the last heartbeat.
"""

import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import Literal, Self, TypeAlias

RUN_FILE = "run.json"
SAMPLES_FOLDER = "samples"
HEARTBEAT_S = 30.0
STALE_S = 300.0
"""Age of a heartbeat from which on the process is taken for dead: a disk or a machine may stall for a while."""

RunState: TypeAlias = Literal["running", "ended", "failed", "died", "unknown"]


@dataclass(frozen=True)
class RunRecord:
    """What `run.json` holds. Times are in Unix seconds; `ended` and `exit_code` are None while the run goes on.

    `process_started` is the process's start in clock ticks since boot, where the system says it: another process that got
    the same id has another one. `best_metric` is what the run chooses its best checkpoint by, and `samples` the folder of
    its sample dumps.
    """

    experiment: str
    pid: int
    host: str
    process_started: int | None
    started: float
    heartbeat: float
    total_steps: int | None = None
    best_metric: str | None = None
    samples: str | None = None
    ended: float | None = None
    exit_code: int | None = None

    def state(self, now: float | None = None) -> RunState:
        """Judge whether the run goes on, ended well, ended with an error, or died without a word."""
        if self.ended is not None:
            return "failed" if self.exit_code else "ended"
        if self.host == socket.gethostname() and not is_alive(self.pid, self.process_started):
            return "died"
        age = (time.time() if now is None else now) - self.heartbeat
        return "died" if age > STALE_S else "running"


class RunRecorder:
    """Keeps a run's `run.json` up to date for the length of a `with` block.

    A disk that cannot be written is not the run's end: a heartbeat is left out, and the next one is tried.
    """

    def __init__(
        self,
        folder: Path,
        experiment: str,
        *,
        total_steps: int | None = None,
        best_metric: str | None = None,
        samples: Path | None = None,
        interval: float = HEARTBEAT_S,
    ) -> None:
        now = time.time()
        self._path = folder / RUN_FILE
        self._record = RunRecord(
            experiment=experiment,
            pid=os.getpid(),
            host=socket.gethostname(),
            process_started=process_start(os.getpid()),
            started=now,
            heartbeat=now,
            total_steps=total_steps,
            best_metric=best_metric,
            samples=None if samples is None else str(samples.absolute()),
        )
        self._interval, self._over = interval, Event()
        self._thread = Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        """Write the file and start the heartbeat."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._write()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write how the run ended: 0, an error's `exit_code`, 130 after an interruption, or 1."""
        code = 0 if error is None else 130 if isinstance(error, KeyboardInterrupt) else 1
        self.end(getattr(error, "exit_code", code))

    def end(self, exit_code: int) -> None:
        """Stop the heartbeat and write the end. Does nothing the second time."""
        if self._over.is_set():
            return
        self._over.set()
        self._thread.join()
        now = time.time()
        self._record = replace(self._record, heartbeat=now, ended=now, exit_code=exit_code)
        self._write()

    def _beat(self) -> None:
        while not self._over.wait(self._interval):
            self._record = replace(self._record, heartbeat=time.time())
            self._write()

    def _write(self) -> None:
        temporary = self._path.with_name(f".{RUN_FILE}.tmp")
        with suppress(OSError):
            temporary.write_text(json.dumps(asdict(self._record)), "utf-8")
            temporary.replace(self._path)


def samples_folder(folder: Path) -> Path:
    """Return where the run in `folder` writes its samples, by its record, or by custom if that does not say."""
    record = read_run(folder)
    return Path(record.samples) if record is not None and record.samples else folder / SAMPLES_FOLDER


def read_run(folder: Path) -> RunRecord | None:
    """Read a run's `run.json`; None if there is none, or if it is not one that this version writes."""
    try:
        return RunRecord(**json.loads((folder / RUN_FILE).read_text("utf-8")))
    except (OSError, TypeError, ValueError):
        return None


def is_alive(pid: int, started: int | None) -> bool:
    """Return whether a process of this machine is running, and is the one that `process_start` gave `started` for."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's, so there is one
        pass
    now = process_start(pid)
    return started is None or now is None or now == started


def process_start(pid: int) -> int | None:
    """Give the start of a process in clock ticks since boot; None where the system has no `/proc`."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
        return int(text.rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None
