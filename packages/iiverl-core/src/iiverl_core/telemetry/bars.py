"""Two live bars at the bottom of a terminal: the run, and what the current step is doing."""

import logging
import sys
from collections.abc import Iterator
from typing import Protocol, TextIO

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from iiverl_core.telemetry.phase import Phase

BAR_WIDTH = 24


class Shown(Protocol):
    """What there is to draw: steps done and in all, how the run goes, and the current phase."""

    step: int
    total: int
    phase_now: Phase | None

    def describe(self) -> str:
        """Say how the run goes."""
        ...


class Bars:
    """Draws the progress of a run four times a second, from a thread of its own."""

    def __init__(self, stream: TextIO, progress: Shown) -> None:
        self._progress = progress
        self._running = False
        self._handlers: list[tuple[logging.StreamHandler, TextIO]] = []
        self._console = Console(file=stream)
        self._live = Live(
            console=self._console,
            get_renderable=self._draw,
            refresh_per_second=4,
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=sys.stderr.isatty(),
        )

    @staticmethod
    def fit(stream: TextIO) -> bool:
        """Tell whether `stream` is a terminal that can redraw a line."""
        return stream.isatty() and not Console(file=stream).is_dumb_terminal

    def start(self) -> None:
        """Show the bars; from here on what is printed or logged appears above them."""
        streams = {sys.stdout: "stdout", sys.stderr: "stderr"}
        self._live.start()
        self._running = True
        for handler in _stream_handlers():
            if handler.stream in streams:
                self._handlers.append((handler, handler.stream))
                handler.setStream(getattr(sys, streams[handler.stream]))

    def stop(self) -> None:
        """Leave the run's bar as it stands and give the terminal back."""
        for handler, stream in self._handlers:
            handler.setStream(stream)
        self._handlers.clear()
        self._running = False
        self._live.stop()

    def say(self, line: str) -> None:
        """Print a line as it is, whatever its length, above the bars."""
        self._console.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def _draw(self) -> Table:
        progress, phase = self._progress, self._progress.phase_now
        table = Table.grid(padding=(0, 1))
        table.add_column(min_width=14, no_wrap=True)
        table.add_column(width=BAR_WIDTH)
        table.add_column(no_wrap=True, overflow="ellipsis")
        bar = ProgressBar(total=max(progress.total, 1), completed=progress.step)
        table.add_row(f"step {progress.step}/{progress.total}", bar, progress.describe())
        if phase:
            bar = ProgressBar(total=phase.total, completed=phase.done, pulse=phase.total is None)
            table.add_row(f"  {phase.name}", bar, phase.describe())
        elif self._running:
            table.add_row("", "", "")  # keeps the height, so that the bars do not jump between phases
        return table


def _stream_handlers() -> Iterator[logging.StreamHandler]:
    """Find every logging handler that writes to a stream."""
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    for logger in loggers:
        for handler in getattr(logger, "handlers", []):
            if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
                yield handler
