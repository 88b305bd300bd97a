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

EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_TERMINATED = 128 + signal.SIGTERM


class Terminated(KeyboardInterrupt):
    """SIGTERM as an exception, so that the cleanup after Ctrl-C runs for it too."""


@contextmanager
def clean_exit() -> Iterator[None]:
    """Turn Ctrl-C, SIGTERM and errors meant for the user into one line on stderr and an exit code.

    Ctrl-C exits with 130, SIGTERM with 143, an `IIVerlError` with its own code. Any other error keeps its traceback.
    """

    def terminate(signum: int, frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
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
        signal.signal(signal.SIGTERM, before)


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
