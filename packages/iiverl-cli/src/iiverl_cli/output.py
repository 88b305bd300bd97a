"""Output of commands: problems of a configuration, tables, and how a run ends."""

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

import typer

from iiverl_core.errors import IIVerlError

if TYPE_CHECKING:
    from iiverl_core.config import Problem
    from iiverl_core.stopping import Stop

EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_TERMINATED = 128 + signal.SIGTERM


class Terminated(KeyboardInterrupt):
    """SIGTERM as an exception, so that the cleanup after Ctrl-C runs for it too."""


@contextmanager
def clean_exit(stop: "Stop | None" = None, grace_seconds: int = 0) -> Iterator[None]:
    """Turn Ctrl-C, SIGTERM and errors meant for the user into one line on stderr and an exit code.

    Ctrl-C exits with 130, SIGTERM with 143, an `IIVerlError` with its own code. Any other error keeps its traceback.

    Args:
        stop: the first signal is passed on to it, so that the run can save its state; a second one ends the run at once.
        grace_seconds: time that SIGTERM leaves for that.
    """

    def end(signum: int, frame: FrameType | None) -> None:
        if stop is not None and (signum == signal.SIGINT or grace_seconds) and stop.request(128 + signum):
            typer.echo("finishing the current step to save it; a second signal stops at once", err=True)
            if signum == signal.SIGTERM:
                signal.alarm(grace_seconds)
        elif signum == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            raise Terminated

    handled = [signal.SIGTERM, signal.SIGALRM]
    if stop is not None and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        handled.append(signal.SIGINT)
    before = {signum: signal.signal(signum, end) for signum in handled}
    try:
        yield
        if stop is not None and stop.requested:
            raise Terminated if stop.exit_code == EXIT_TERMINATED else KeyboardInterrupt
    except Terminated:
        typer.echo("terminated", err=True)
        raise typer.Exit(EXIT_TERMINATED) from None
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except IIVerlError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(error.exit_code) from None
    finally:
        signal.alarm(0)
        for signum, handler in before.items():
            signal.signal(signum, handler)


def format_table(rows: Sequence[tuple[str, ...]], *, align: str = "<", rule: bool = False) -> str:
    """Lay out rows of cells in columns as wide as their widest cell.

    `align` has `<` or `>` per column, and its last character applies to all further ones. With `rule`, a line is drawn
    below the first row.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    signs = align + align[-1] * len(widths)
    lines = [
        "  ".join(
            f"{cell:{sign}{width}}" for cell, sign, width in zip(row, signs, widths, strict=False)
        ).rstrip()
        for row in rows
    ]
    if rule:
        lines.insert(1, "─" * (sum(widths) + 2 * (len(widths) - 1)))
    return "\n".join(lines)


def report_problems(problems: "Sequence[Problem]", *, running: bool = False) -> None:
    """Print the problems of a configuration, one per line."""
    from iiverl_core.config import render

    if problems:
        typer.echo(render(problems, running=running), err=True)
