"""Show the progress of a run: two live bars on a terminal, plain lines elsewhere."""

import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TextIO

from iiverl_core import activity
from iiverl_core.telemetry.bars import Bars
from iiverl_core.telemetry.metrics import SCORE
from iiverl_core.telemetry.terminal import InputWatcher
from iiverl_core.telemetry.timers import Phase, duration

REFRESH_SECONDS = 0.25


class Progress:
    """Shows how far a run is, from `start_step` done to `total_steps`; use it in a `with` block.

    On a terminal there is a bar for the run and one for the current phase, and printed or logged lines appear above
    them. Elsewhere there is a line per step, unless `step_lines` is off because something else logs one, and a line
    every `every` seconds of a long phase. While a debugger or a prompt reads input, nothing is shown: lines wait until
    it is done. Every call takes microseconds. Leaving the block, also by an exception, restores the terminal.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        *,
        step_lines: bool = True,
        stream: TextIO | None = None,
        every: float = 10.0,
    ) -> None:
        self.total, self.step = total_steps, start_step
        self._phases: list[Phase] = []  # those that are open, of any thread
        self._stream = stream or sys.stdout
        self._step_lines, self._every = step_lines, every
        self._seconds: deque[float] = deque(maxlen=20)
        self._reward: float | None = None
        self._mean: float | None = None
        self._last_step = self._last_line = time.perf_counter()
        self._bars = Bars(self._stream, self) if Bars.fit(self._stream) else None
        self._input = InputWatcher(before=self._bars.pause if self._bars else lambda: None)
        self._pending: list[str] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def __enter__(self) -> "Progress":
        self._last_step = time.perf_counter()
        self._input.start()
        if self._bars:
            self._bars.start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._phases.clear()
        self._stop.set()
        self._thread.join()
        self._input.stop()
        if self._bars:
            self._bars.stop()
        self._flush()

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Phase]:
        """Show `name` as the current phase; yield the counter of its `total` items."""
        phase = Phase(name, total)
        self._phases.append(phase)
        try:
            with activity.call(name):
                yield phase
        finally:
            with suppress(ValueError):  # the display has ended
                self._phases.remove(phase)

    @property
    def phase_now(self) -> Phase | None:
        """The phase that began last, of those that are not over."""
        phases = self._phases[-1:]
        return phases[0] if phases else None

    @property
    def reading_input(self) -> bool:
        """Whether a debugger or a prompt reads input."""
        return self._input.pending()

    def step_done(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show that `step` is done; its metrics hold the reward and, as `timing_s/step`, the time."""
        now = time.perf_counter()
        self._seconds.append(metrics.get("timing_s/step", now - self._last_step))
        self._mean = sum(self._seconds) / len(self._seconds)
        self._last_step, self.step = now, step
        self._reward = metrics.get(SCORE, self._reward)
        if self._step_lines and not self._bars:
            self.log(f"step {step}/{self.total}  {self.describe()}")

    def describe(self) -> str:
        """Describe the run: `reward 0.412  0.82 s/step  1m12s left`; the time is a mean of the last steps."""
        parts = [] if self._reward is None else [f"reward {self._reward:.3f}"]
        if self._mean is not None:
            parts.append(f"{self._mean:.2f} s/step")
            if self.step < self.total:
                parts.append(f"{duration(self._mean * (self.total - self.step))} left")
        return "  ".join(parts)

    def log(self, line: str) -> None:
        """Print a line, above any bars; while a debugger or a prompt reads input, the line waits."""
        self._last_line = time.perf_counter()
        with self._lock:
            self._pending.append(line)
        if not self._input.pending():
            self._flush()

    def _flush(self) -> None:
        with self._lock:
            lines, self._pending = self._pending, []
            for line in lines:
                if self._bars:
                    self._bars.log(line)
                else:
                    self._stream.write(line + "\n")
            if lines and not self._bars:
                self._stream.flush()

    def _run(self) -> None:
        """Redraw the bars; without bars, print the current phase if nothing was printed for a while."""
        while not self._stop.wait(REFRESH_SECONDS if self._bars else self._every / 20):
            if self._input.pending():
                continue
            self._flush()
            phase = self.phase_now
            if self._bars:
                self._bars.refresh()
            elif phase and time.perf_counter() - max(phase.started, self._last_line) >= self._every:
                self.log(f"  {phase.name}  {phase.describe()}")
