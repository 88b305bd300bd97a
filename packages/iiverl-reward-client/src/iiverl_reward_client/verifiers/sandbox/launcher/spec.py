"""Messages between the caller and the launcher: JSON, one object per line."""

import json
import os
from typing import Any, NamedTuple


class Spec(NamedTuple):
    """One program and its limits, see `Limits`; `interpreter` is under `prefix`.

    `parent` is the pid of the caller; the launcher ends with it.
    """

    source: str
    interpreter: str
    prefix: str
    parent: int
    cpu_seconds: float
    wall_seconds: float
    memory_bytes: int
    processes: int
    file_bytes: int

    def to_json(self) -> bytes:
        """Write the spec in ASCII, which keeps unpaired surrogates."""
        return json.dumps(self._asdict()).encode("ascii")

    @classmethod
    def from_json(cls, document: bytes) -> "Spec":
        """Read the output of `to_json`."""
        return cls(**json.loads(document))


def send(control: int, **message: Any) -> None:
    """Send the caller one message: `ready=True`, `error=…`, or `exit_code`, `signal` and `ended`."""
    os.write(control, json.dumps(message).encode("ascii") + b"\n")


def received(messages: bytes | bytearray) -> dict[str, Any]:
    """Merge the messages received on a control pipe."""
    joined: dict[str, Any] = {}
    for line in messages.splitlines():
        joined |= json.loads(line)
    return joined
