"""Output of commands: problems of a configuration, tables, and how a run ends."""

import os
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

EXIT_REFUSED = 2
EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_TERMINATED = 128 + signal.SIGTERM


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP as an exception, so that the cleanup after Ctrl-C runs for them too."""

    def __init__(self, exit_code: int = EXIT_TERMINATED) -> None:
        super().__init__()
        self.exit_code = exit_code


@contextmanager
def clean_exit(stop: "Stop | None" = None, grace_seconds: int = 0) -> Iterator[None]:
    """Turn Ctrl-C, SIGTERM, SIGHUP and errors meant for the user into one line on stderr and an exit code.

    Ctrl-C exits with 130, SIGTERM with 143, SIGHUP, as when a terminal is closed, with 129, and an `IIVerlError` with its
    own code. Any other error keeps its traceback. SIGHUP stays ignored below `nohup`.

    Args:
        stop: the first signal is passed on to it, so that the run can save its state; a second one ends the run at once.
        grace_seconds: time that SIGTERM and SIGHUP leave for that.
    """

    terminals = [fd for fd in (1, 2) if os.isatty(fd)]

    def end(signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGHUP:
            _write_nowhere(terminals)
        if stop is not None and (signum == signal.SIGINT or grace_seconds) and stop.request(128 + signum):
            typer.echo("finishing the current step to save it; a second signal stops at once", err=True)
            if signum != signal.SIGINT:
                signal.alarm(grace_seconds)
        elif signum == signal.SIGINT:
            raise KeyboardInterrupt
        elif signum == signal.SIGALRM and stop is not None:
            raise Terminated(stop.exit_code)
        else:
            raise Terminated(128 + signum)

    handled = [signal.SIGTERM, signal.SIGALRM]
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        handled.append(signal.SIGHUP)
    if stop is not None and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        handled.append(signal.SIGINT)
    before = {signum: signal.signal(signum, end) for signum in handled}
    try:
        yield
        if stop is not None and stop.requested:
            raise KeyboardInterrupt if stop.exit_code == EXIT_INTERRUPTED else Terminated(stop.exit_code)
    except Terminated as terminated:
        typer.echo("terminated", err=True)
        raise typer.Exit(terminated.exit_code) from None
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except IIVerlError as error:
        code = f"[{error.code}]" if error.code else ""
        typer.echo(f"error{code}: {error}", err=True)
        raise typer.Exit(error.exit_code) from None
    finally:
        signal.alarm(0)
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _write_nowhere(fds: Sequence[int]) -> None:
    """Drop what is written to these: a terminal that is gone fails every write."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    for fd in fds:
        os.dup2(nothing, fd)
    os.close(nothing)


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
