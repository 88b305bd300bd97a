"""Which streams take escape codes: cursor movement and colour belong on a terminal, never in a file."""

import os
from typing import TextIO


def takes_escape_codes(stream: TextIO) -> bool:
    """Tell whether `stream` is a terminal that is not `dumb`, and the user has not set `NO_COLOR`."""
    known = os.environ.get("TERM", "") not in ("", "dumb")
    return stream.isatty() and known and not os.environ.get("NO_COLOR")
