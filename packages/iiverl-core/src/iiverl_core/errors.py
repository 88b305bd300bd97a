"""Errors whose message is for the person who runs the program, and who should read it without a traceback."""


class IIVerlError(Exception):
    """What went wrong, where, and what to do next; the command line prints it and exits with `exit_code`."""

    exit_code: int = 1


class ConfigError(IIVerlError):
    """The configuration, or what it names, is not what a run needs."""

    exit_code: int = 2


class CheckpointError(IIVerlError):
    """A checkpoint cannot be written, or is not what the run needs."""


class DataError(IIVerlError):
    """A dataset cannot be read, or its rows are not what a run needs."""

    exit_code: int = 2
