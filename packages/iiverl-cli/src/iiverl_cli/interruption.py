"""Ending a run that is interrupted or that fails: cleanup, one message, and an exit code."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import typer

from iiverl_core.errors import IIVerlError

EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_TERMINATED = 128 + signal.SIGTERM


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised as an exception so that the cleanup after Ctrl-C runs after it too."""


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
