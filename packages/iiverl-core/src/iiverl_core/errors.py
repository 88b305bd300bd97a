"""Errors whose message is for the user, who reads it without a traceback."""

from collections.abc import Sequence

NAMED = 5  # names that a message lists


class IIVerlError(Exception):
    """The message says what went wrong, where, and what to do; the command line prints it and exits with `exit_code`."""

    exit_code: int = 1
    code: str | None = None
    """Names the kind of error, for searching in the docs."""


class ConfigError(IIVerlError):
    """The configuration, or what it names, is not what a run needs."""

    exit_code: int = 2


class CheckpointError(IIVerlError):
    """A checkpoint cannot be written, or is not what the run needs."""


class NonFiniteError(IIVerlError):
    """A model or its training has produced NaN or infinity, with which the run cannot continue."""


class WeightMismatchError(IIVerlError):
    """An engine has other weights than those that the trainer computes with, so its responses are another policy's."""


class DataError(IIVerlError):
    """A dataset cannot be read, or its rows are not what a run needs."""

    exit_code: int = 2


def join_names(names: Sequence[str], separator: str = ", ") -> str:
    """Join the first names for a message, and count the others."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return separator.join(names[:NAMED]) + more
