"""Draw two live bars at the bottom of a terminal: the run, and the current phase of its step."""

import logging
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Protocol, TextIO

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from iiverl_core.telemetry.terminal import takes_escape_codes
from iiverl_core.telemetry.timers import Phase

BAR_WIDTH = 24
MIN_BAR_WIDTH = 6
LABEL_WIDTH = 14


class ProgressState(Protocol):
    """The state to draw: the step, the total number of steps, and the current phase."""

    step: int
    total: int

    @property
    def phase_now(self) -> Phase | None:
        """The current phase."""
        ...

    def describe(self) -> str:
        """Describe the run, as parts separated by two spaces."""
        ...


class Bars:
    """Draws the progress of a run on each call of `refresh`, from any thread."""

    def __init__(self, stream: TextIO, progress: ProgressState) -> None:
        self._progress = progress
        self._running = False
        self._handlers: list[tuple[logging.StreamHandler, TextIO]] = []
        self._console = Console(file=stream)
        self._live: Live | None = None
        self._lock = threading.RLock()

    @staticmethod
    def fit(stream: TextIO) -> bool:
        """Tell whether `stream` is a terminal that can redraw a line."""
        return takes_escape_codes(stream)

    def start(self) -> None:
        """Show the bars; from now on, printed and logged lines appear above them."""
        streams = {sys.stdout: "stdout", sys.stderr: "stderr"}
        self._running = True
        self.refresh()
        for handler in _stream_handlers():
            if handler.stream in streams:
                self._handlers.append((handler, handler.stream))
                handler.setStream(getattr(sys, streams[handler.stream]))

    def refresh(self) -> None:
        """Redraw the bars, also after `pause`."""
        with self._lock:
            if not self._running:
                return
            if self._live is None:
                self._live = Live(
                    console=self._console,
                    get_renderable=self._draw,
                    auto_refresh=False,
                    redirect_stdout=sys.stdout.isatty(),
                    redirect_stderr=sys.stderr.isatty(),
                )
                self._live.start()
            self._live.refresh()

    def pause(self) -> None:
        """Remove the bars from the terminal until the next `refresh`."""
        with self._lock:
            if self._live is not None:
                self._live.transient = True
                self._live.stop()
                self._live = None

    def stop(self) -> None:
        """Leave the run's bar as it is and restore the terminal."""
        for handler, stream in self._handlers:
            handler.setStream(stream)
        self._handlers.clear()
        with self._lock:
            self._running = False
            if self._live is not None:
                self._live.stop()
                self._live = None

    def log(self, line: str) -> None:
        """Print a line above the bars, without wrapping it."""
        self._console.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def _draw(self) -> Table:
        progress, phase = self._progress, self._progress.phase_now
        labels = [f"step {progress.step}/{progress.total}"]
        bars = [ProgressBar(total=max(progress.total, 1), completed=progress.step)]
        texts = [progress.describe()]
        if phase:
            labels.append(f"  {phase.name}")
            bars.append(ProgressBar(total=phase.total, completed=phase.done, pulse=phase.total is None))
            texts.append(phase.describe())
        width, texts = fit_row(labels, texts, self._console.width)
        table = Table.grid(padding=(0, 1))
        table.add_column(min_width=LABEL_WIDTH, no_wrap=True)
        if width:
            table.add_column(width=width)
        table.add_column(no_wrap=True)
        for label, bar, text in zip(labels, bars, texts, strict=True):
            table.add_row(*([label, bar, text] if width else [label, text]))
        if self._running and not phase:
            table.add_row("")  # keeps the height constant between phases
        return table


def fit_row(labels: Sequence[str], texts: Sequence[str], columns: int) -> tuple[int, list[str]]:
    """Return the width of the bars between labels and texts (0 for no bars), and the texts that fit.

    Bars shrink first; then whole parts of the texts are dropped, the last first.
    """
    label = max(LABEL_WIDTH, *map(len, labels))
    width = columns - label - 2 - max(map(len, texts))
    if width >= MIN_BAR_WIDTH:
        return min(BAR_WIDTH, width), list(texts)
    fitting = []
    for text in texts:
        parts = text.split("  ")
        while parts and label + 1 + len("  ".join(parts)) > columns:
            parts.pop()
        fitting.append("  ".join(parts))
    return 0, fitting


def _stream_handlers() -> Iterator[logging.StreamHandler]:
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    for logger in loggers:
        for handler in getattr(logger, "handlers", []):
            if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
                yield handler
