"""What the caller tells the launcher, and what the launcher tells back: JSON, one object a line."""

import json
import os
from typing import Any, NamedTuple


class Spec(NamedTuple):
    """One program and its limits, as `Limits` has them; `interpreter` lies under `prefix`.

    `parent` is the pid of the caller, at whose end the launcher ends too.
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
        """Write the spec in ASCII, so that even half a surrogate pair comes through."""
        return json.dumps(self._asdict()).encode("ascii")

    @classmethod
    def from_json(cls, document: bytes) -> "Spec":
        """Read what `to_json` wrote."""
        return cls(**json.loads(document))


def tell(control: int, **message: Any) -> None:
    """Send the caller one message: `ready=True`, `error=…`, or `exit_code`, `signal` and `ended`."""
    os.write(control, json.dumps(message).encode("ascii") + b"\n")


def heard(messages: bytes | bytearray) -> dict[str, Any]:
    """Join all that was told on one control pipe."""
    joined: dict[str, Any] = {}
    for line in messages.splitlines():
        joined |= json.loads(line)
    return joined
