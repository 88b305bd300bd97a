"""A process that runs environments of the user's, one after another.

It imports neither torch nor the rest of iiverl, unless the user's file does. `rollout/environment_pool.py` starts it as a
`UserProcess` and sends one `Setup` and then `Call`s; each is answered by a `Reply`, whose value is the messages of `reset`
(None for the row's prompt), or an `Answered`.
"""

import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from iiverl_core.environment import Turn
from iiverl_core.errors import ConfigError
from iiverl_core.message_parts import plain_content
from iiverl_core.python_files import (
    find_callable,
    find_installed,
    load_file,
    repr_with_type,
    short_repr,
    user_traceback,
)
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

SECTION = "multi_turn.environment"


@dataclass(frozen=True, slots=True)
class Setup:
    """The class `name` of the file at `path`, or of an installed module if it is None; and its keyword arguments."""

    search_path: list[str]
    path: str | None
    name: str
    kwargs: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Call:
    """A call of `reset` with a row, which makes the environment, of `step` with a message, or of `close`.

    Random numbers that it draws depend on `seed` alone.
    """

    id: int
    seed: str
    method: Literal["reset", "step", "close"]
    argument: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Answered:
    """A `Turn` of plain data: messages, a reward that fp32 can hold, numbers and the rest of its info."""

    messages: list[dict[str, Any]]
    reward: float
    done: bool
    components: dict[str, float]
    info: dict[str, Any]


def main(lifeline_fd: int, shared_fd: int) -> None:
    """Answer calls until the process that started this one is gone."""
    calls, replies, _ = begin(lifeline_fd, shared_fd)
    setup: Setup = read_message(calls)
    sys.path[:] = setup.search_path
    try:
        if setup.path is None:
            path, make = find_installed(setup.name, f"{SECTION}.name")
        else:
            path, module = load_file(setup.path, f"{SECTION}.path")
            make = find_callable(path, module, setup.name, f"{SECTION}.name")
    except ConfigError as error:
        write_answer(replies, Reply(0, str(error)))
        return
    write_answer(replies, Reply(0))
    environment: Any = None
    with asyncio.Runner() as runner:
        while (call := read_message(calls)) is not None:
            try:
                seed_random(call.seed)
                if call.method == "reset":
                    environment = make(**setup.kwargs)
                    returned = awaited(environment.reset(call.argument), runner)
                    value = None if returned is None else _messages(returned, "reset")
                elif call.method == "step":
                    value = _answered(awaited(environment.step(call.argument), runner))
                else:
                    closed, environment = environment, None
                    close = getattr(closed, "close", None)
                    if close is not None:
                        awaited(close(), runner)
                    value = None
                reply = Reply(call.id, value=value)
            except USER_ERRORS as error:
                reply = Reply(call.id, _described(error, path, setup.name, call.method))
            bound_output()
            write_answer(replies, reply)


class _GarbageError(Exception):
    """A method returned something that it must not; the message says what."""


def _described(error: BaseException, path: Path, name: str, method: str) -> str:
    if isinstance(error, _GarbageError):
        return f"{name}.{method} in {path.name} {error}"
    return user_traceback(error, path)


def _answered(turn: Any) -> Answered:
    if not isinstance(turn, Turn):
        raise _GarbageError(f"returned {repr_with_type(turn)}, which is not a Turn")
    reward = finite_number(turn.reward)
    if reward is None:
        raise _GarbageError(
            f"returned a Turn with the reward {repr_with_type(turn.reward)}, which is not a finite number below {MAX_SCORE:g}"
        )
    if type(turn.done).__name__ not in ("bool", "bool_"):  # also numpy's
        raise _GarbageError(f"returned a Turn whose done is {repr_with_type(turn.done)}, not a bool")
    if not isinstance(turn.info, Mapping):
        raise _GarbageError(f"returned a Turn whose info is {repr_with_type(turn.info)}, not a dict")
    messages = _messages(turn.messages, "step")
    if not messages and not turn.done:
        raise _GarbageError(
            "returned a Turn without messages that is not done: the model has nothing to answer"
        )
    components, info = split_info(turn.info)
    return Answered(messages, reward, bool(turn.done), components, info)


def split_info(info: Mapping[Any, Any]) -> tuple[dict[str, float], dict[str, Any]]:
    """Return the numbers, which become components of a score, and the rest as plain data."""
    numbers = {str(name): finite_number(value) for name, value in info.items()}
    rest = {str(name): _plain(value) for name, value in info.items() if numbers[str(name)] is None}
    return {name: number for name, number in numbers.items() if number is not None}, rest


def _messages(value: Any, method: str) -> list[dict[str, Any]]:
    """Check messages, and convert them to plain data that can be encoded."""
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, Sequence):
        raise _GarbageError(f"returned {repr_with_type(value)} in place of messages")
    messages = [_message(message) for message in value]
    if method == "reset" and not value:
        raise _GarbageError("returned no messages; return None for the row's prompt")
    try:
        return json.loads(json.dumps(messages, ensure_ascii=False).encode())
    except (TypeError, ValueError, RecursionError) as error:
        raise _GarbageError(f"returned messages that are not plain text: {error}") from error


def _message(message: Any) -> dict[str, Any]:
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, str | list) or not isinstance(message.get("role"), str):
        raise _GarbageError(
            f"returned {repr_with_type(message)} as a message; it needs a role and a content that are strings, or a list of "
            "texts and images as its content"
        )
    try:
        return {**message, "content": plain_content(content)}
    except ValueError as error:
        raise _GarbageError(f"returned a message that {error}") from error


def _plain(value: Any) -> Any:
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError):
        return short_repr(value)
