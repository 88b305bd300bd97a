"""A watchdog on progress: it ends a run in which nothing moves any more, and says who waits where.

Progress is anything that gets done, in this process or another (`iiverl_core.activity`): the result of a call, an
optimizer's micro-batch, a step of an engine, an outcome. That a process is alive is none.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from iiverl_core import activity
from iiverl_core.cluster.runtime import ProcessReport, WorkerDiedError
from iiverl_core.errors import IIVerlError
from iiverl_core.telemetry import Progress
from iiverl_core.telemetry.timers import duration

START_S = (
    120  # least patience with a process that has not reported yet: it imports torch, perhaps from a slow disk
)
SILENT_BEATS = 4  # missed in a row: a process that sends none has stopped, or its machine has
WAKE_SIGNAL = signal.SIGURG  # ignored by default, and by everything else that runs here


class StallError(IIVerlError):
    """Nothing moved for `trainer.stall_timeout` seconds, and no worker is to blame."""


class WorkerStalledError(WorkerDiedError):
    """Nothing moved for `trainer.stall_timeout` seconds while workers were in a call; new ones may fare better."""


class Watchdog:
    """Watches a run from a thread, and raises in the main thread when nothing has moved for `timeout_s`.

    `reports` returns what the other processes are doing; whoever starts them sets it.
    """

    def __init__(self, timeout_s: float, folder: Path, progress: Progress) -> None:
        self.timeout_s = timeout_s
        self.interval_s = min(max(timeout_s / 10, 0.1), 2.0)
        """Seconds between two looks, and between two reports of a process."""
        self.reports: Callable[[], Sequence[ProcessReport]] = list
        self._folder, self._progress = folder / "stalls", progress
        self._error: IIVerlError | None = None
        self._over = threading.Event()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch while the block runs.

        Raises:
            WorkerStalledError: nothing moved, and workers were in a call.
            StallError: nothing moved, and no worker was in a call.
        """
        if threading.current_thread() is not threading.main_thread() or self.timeout_s <= 0:
            yield  # only the main thread can be interrupted
            return
        before = signal.signal(WAKE_SIGNAL, self._interrupt)
        thread = threading.Thread(target=self._watch, name="iiverl-watchdog", daemon=True)
        thread.start()
        try:
            yield
        except KeyboardInterrupt:
            if self._error is None:
                raise
            raise self._error from None
        finally:
            self._over.set()
            thread.join()
            signal.signal(WAKE_SIGNAL, before)

    def _watch(self) -> None:
        seen: object = None
        still_s, before = 0.0, time.monotonic()
        while not self._over.wait(self.interval_s):
            reports, now = self.reports(), time.monotonic()
            counts = (activity.current().count, [(report.label, report.count) for report in reports])
            # A process that was suspended, as by Ctrl-Z, has watched nothing meanwhile.
            still_s = still_s + min(now - before, 2 * self.interval_s) if counts == seen else 0.0
            seen, before = counts, now
            if self._progress.reading_input:
                still_s = 0.0  # somebody is at a debugger's prompt
            starting = any(report.age_s is None for report in reports)
            if still_s >= (max(self.timeout_s, START_S) if starting else self.timeout_s):
                self._stalled(reports)
                still_s = 0.0

    def _stalled(self, reports: Sequence[ProcessReport]) -> None:
        file = self._folder / f"{datetime.now():%Y-%m-%dT%H-%M-%S}.txt"
        who = self._describe(reports)
        message = (
            f"nothing has moved for {duration(self.timeout_s)} (trainer.stall_timeout): {'; '.join(who)}.\n"
            f"The stacks of all processes are in {file}."
        )
        self._folder.mkdir(parents=True, exist_ok=True)
        file.write_text(
            "\n".join([message, "", "=== this process", activity.stacks(), *map(_stacks, reports)])
        )
        if self._error is not None:
            # The first error has not ended the run: a lock or a library holds the main thread.
            self._progress.log(f"error: {message}\nThe run does not end by itself; its process ends now.")
            os._exit(1)
        at_fault = any(report.call is not None or self._is_silent(report) for report in reports)
        self._error = (WorkerStalledError if at_fault else StallError)(message)
        signal.pthread_kill(threading.main_thread().ident or 0, WAKE_SIGNAL)

    def _describe(self, reports: Sequence[ProcessReport]) -> list[str]:
        """Say what each process does, those that do not answer first."""
        silent = [report for report in reports if self._is_silent(report)]
        busy = [report for report in reports if report.call is not None and report not in silent]
        who = [
            f"{_name(report)} does not answer"
            + (f" since {duration(report.age_s)}, last in {report.call or 'no call'}" if report.age_s else "")
            for report in silent
        ]
        who += [f"{_name(report)} is in {report.call} since {duration(report.call_s)}" for report in busy]
        phase = self._progress.phase_now
        here = (
            f"this process is in the phase '{phase.name}'" if phase else "this process is between two phases"
        )
        return [*who, f"{here} ({'; '.join(activity.innermost())})"]

    def _is_silent(self, report: ProcessReport) -> bool:
        return report.age_s is None or report.age_s > SILENT_BEATS * self.interval_s

    def _interrupt(self, *_: object) -> None:
        if self._error is not None:
            raise KeyboardInterrupt  # the one exception that ends every wait: Ray's drop others


def _name(report: ProcessReport) -> str:
    return f"{report.label} ({report.process})" if report.process else report.label


def _stacks(report: ProcessReport) -> str:
    return f"=== {_name(report)}, in {report.call or 'no call'}\n{report.stacks or '(none received)'}"
