"""What is wrong with a dataset."""

from iiverl_core.errors import IIVerlError


class DataError(IIVerlError):
    """A dataset cannot be read, or its rows are not what a run needs."""

    exit_code: int = 2
