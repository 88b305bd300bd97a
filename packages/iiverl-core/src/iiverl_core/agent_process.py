"""A process that runs agents of the user's, one after another: a function, or a command.

It imports neither torch nor the rest of iiverl, unless the user's file does. `rollout/agent_pool.py` starts it as a
`UserProcess` and sends one `Setup` and then `Call`s; each is answered by a `Reply`, whose value is `Ended`.
"""

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from iiverl_core.environment_process import split_info
from iiverl_core.errors import ConfigError
from iiverl_core.python_files import find_callable, load_file, repr_with_type, user_traceback
from iiverl_core.reward_process import MAX_SCORE, finite_number
from iiverl_core.user_process import (
    USER_ERRORS,
    Reply,
    awaited,
    begin,
    bound_output,
    read_message,
    seed_random,
    write_answer,
)

SECTION = "multi_turn.agent"
HOST = "127.0.0.1"
URL, KEY = "OPENAI_BASE_URL", "OPENAI_API_KEY"
ROW, RESULT = "IIVERL_ROW", "IIVERL_RESULT"
"""Variables of a command: files with the row, and for what a function would return, both as JSON."""

_ERRORS_BYTES = 2000
_ERRORS_S = 1.0  # to read what a command has written


@dataclass(frozen=True, slots=True)
class Setup:
    """The function `name` of the file at `path`, or the `command`, whose files go into `folder`."""

    search_path: list[str]
    path: str | None
    name: str
    command: Sequence[str]
    folder: str


@dataclass(frozen=True, slots=True)
class Call:
    """Run the agent for a row. Random numbers that a function draws depend on `seed` alone."""

    id: int
    seed: str
    base_url: str
    api_key: str
    row: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Ended:
    """What an agent returned: a reward that fp32 can hold, if it gave one, numbers, and the rest of its info."""

    reward: float | None = None
    components: dict[str, float] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)


class _GarbageError(Exception):
    """An agent returned something that it must not, or its command failed; the message says what."""


def main(lifeline_fd: int, shared_fd: int) -> None:
    """Answer calls until the process that started this one is gone."""
    calls, replies, _ = begin(lifeline_fd, shared_fd)
    setup: Setup = read_message(calls)
    sys.path[:] = setup.search_path
    _reach_this_machine()
    function: Callable[..., Any] | None = None
    path = Path()
    if setup.path is not None:
        try:
            path, module = load_file(setup.path, f"{SECTION}.path")
            function = find_callable(path, module, setup.name, f"{SECTION}.name")
        except ConfigError as error:
            write_answer(replies, Reply(0, str(error)))
            return
    write_answer(replies, Reply(0))
    with asyncio.Runner() as runner:
        while (call := read_message(calls)) is not None:
            try:
                seed_random(call.seed)
                os.environ.update({URL: call.base_url, KEY: call.api_key})
                if function is None:
                    returned = _run(setup, call)
                else:
                    returned = function(base_url=call.base_url, api_key=call.api_key, row=call.row)
                    returned = awaited(returned, runner)
                reply = Reply(call.id, value=_ended(returned))
            except _GarbageError as error:
                what = f"{setup.name} in {path.name}" if function else setup.command[0]
                reply = Reply(call.id, f"{what} {error}")
            except USER_ERRORS as error:
                reply = Reply(call.id, user_traceback(error, path))
            bound_output()
            write_answer(replies, reply)


def _reach_this_machine() -> None:
    """Let clients reach the endpoint directly, if a proxy is set for what is elsewhere."""
    without = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    without = f"{without},{HOST}" if without else HOST
    os.environ.update(no_proxy=without, NO_PROXY=without)


def _run(setup: Setup, call: Call) -> Any:
    """Run the command, and return what it wrote as its result."""
    row, result = (Path(setup.folder) / f"{os.getpid()}-{name}.json" for name in ("row", "result"))
    row.write_text(json.dumps(call.row, ensure_ascii=False, default=str), encoding="utf-8")
    result.unlink(missing_ok=True)
    try:
        # It stays in this process's group, which is ended as a whole.
        process = subprocess.Popen(
            setup.command, stderr=subprocess.PIPE, env={**os.environ, ROW: str(row), RESULT: str(result)}
        )
    except OSError as error:
        raise _GarbageError(f"cannot be started: {error}") from error
    errors = _Errors(process.stderr)
    code = process.wait()
    if code:
        how = f"ended with exit code {code}" if code > 0 else f"was ended by signal {-code}"
        raise _GarbageError("\n".join(filter(None, (how, errors.end()))))
    if not result.exists():
        return None
    try:
        return json.loads(result.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _GarbageError(f"wrote a result that is not JSON: {error}") from error


class _Errors:
    """Passes on what a command writes to its standard error, and keeps the end of it."""

    def __init__(self, stream: IO[bytes] | None) -> None:
        assert stream is not None
        self._stream, self._last = stream, b""
        self._thread = threading.Thread(target=self._pass_on, daemon=True)
        self._thread.start()

    def end(self) -> str:
        """Return the last characters. What the command has left running may still write."""
        self._thread.join(_ERRORS_S)
        return self._last.decode(errors="replace").strip()

    def _pass_on(self) -> None:
        with self._stream:
            while part := os.read(self._stream.fileno(), 2**16):
                os.write(2, part)
                self._last = (self._last + part)[-_ERRORS_BYTES:]


def _ended(returned: Any) -> Ended:
    """Check what an agent returned: None, a reward, or a mapping with `reward` and further values."""
    if returned is None:
        return Ended()
    values = dict(returned) if isinstance(returned, Mapping) else {"reward": returned}
    reward = values.pop("reward", None)
    number = finite_number(reward)
    if reward is not None and number is None:
        raise _GarbageError(
            f"returned the reward {repr_with_type(reward)}, which is not a finite number below {MAX_SCORE:g}"
        )
    return Ended(number, *split_info(values))
