"""A process that calls a user's reward function.

A process can be stopped during a call, and what it does with signals, threads and output is its own. It imports neither
torch nor the rest of iiverl, unless the user's file does. `rewards/function_pool.py` starts it as a `UserProcess` and
sends one `Setup` and then `Call`s; each is answered by a `Reply`, in any order.
"""

import asyncio
import inspect
import math
import mmap
import pickle
import struct
import sys
from collections.abc import Awaitable, Callable, Generator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from numbers import Real
from pathlib import Path
from typing import Any, Literal

from iiverl_core.errors import ConfigError
from iiverl_core.python_files import find_callable, load_file, repr_with_type, short_repr, user_traceback
from iiverl_core.user_process import (
    USER_ERRORS,
    begin,
    bound_output,
    mark_running,
    read_message,
    seed_random,
    write_answer,
)

MAX_SCORE = struct.unpack("<f", b"\xff\xff\x7f\x7f")[0]
"""Largest score: advantages are computed in fp32, in which a larger one is infinite."""

ASYNC_CALLS = 64
"""Calls of a coroutine function that one process awaits side by side."""


@dataclass(frozen=True, slots=True)
class Setup:
    """The function `name` of the file at `path`, its further arguments, and the limit of a coroutine in seconds."""

    search_path: list[str]
    path: str
    name: str
    kwargs: Mapping[str, Any]
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Call:
    """A call with keyword arguments; random numbers that it draws depend on `seed` alone."""

    id: int
    seed: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to a call, or to the setup, whose `id` is 0 and whose `calls` says how many calls may run at a time.

    `info` is pickled on its own, since only this process may be able to read what the function returned.
    """

    id: int
    problem: Literal["", "function", "timeout"] = ""
    detail: str = ""
    score: float = 0.0
    components: Mapping[str, float] = field(default_factory=dict)
    info: bytes = b""
    calls: int = 1


class ReturnError(ValueError):
    """The return value of a reward function is not a score; the message names it."""


def parts_of_return(returned: Any) -> tuple[float, dict[str, float], dict[str, Any]]:
    """Return score, components and info of the return value of a reward function.

    A finite number is the score, also in an array or tensor of one element. So is `score` of a mapping, whose other
    finite numbers become components and the rest info.

    Raises:
        ReturnError: it is anything else.
    """
    if not isinstance(returned, Mapping):
        score = finite_number(returned)
        if score is None:
            raise ReturnError(
                f"returned {repr_with_type(returned)}, which is not a finite number that fp32 can hold"
            )
        return score, {}, {}
    if "score" not in returned:
        keys = ", ".join(short_repr(key) for key in list(returned)[:10]) or "none"
        raise ReturnError(f"returned a dict without 'score'; its keys: {keys}")
    score = finite_number(returned["score"])
    if score is None:
        raise ReturnError(
            f"returned a dict whose 'score' is {repr_with_type(returned['score'])}, which is not a finite number that fp32 "
            "can hold"
        )
    components: dict[str, float] = {}
    info: dict[str, Any] = {}
    for key, value in returned.items():
        if key == "score":
            continue
        number = finite_number(value)
        if number is None:
            info[str(key)] = value
        else:
            components[str(key)] = number
    return score, components, info


def name_of(function: Callable[..., Any], path: Path) -> str:
    """Name a function and its file, for messages."""
    return f"{getattr(function, '__name__', type(function).__name__)} in {path}"


def main(lifeline_fd: int, shared_fd: int) -> None:
    """Answer calls until the process that started this one is gone."""
    requests, replies, shared = begin(lifeline_fd, shared_fd)
    setup: Setup = read_message(requests)
    sys.path[:] = setup.search_path
    try:
        path, module = load_file(setup.path, "custom_reward_function.path")
        function = find_callable(path, module, setup.name, "custom_reward_function.name")
    except ConfigError as error:
        write_answer(replies, Reply(0, "function", str(error)))
        return
    caller = _Caller(function, path, setup, shared)
    if caller.is_async:
        write_answer(replies, Reply(0, calls=ASYNC_CALLS))
        asyncio.run(_answer_side_by_side(caller, requests, replies))
    else:
        write_answer(replies, Reply(0))
        with asyncio.Runner() as runner:
            while (call := read_message(requests)) is not None:
                write_answer(replies, caller.call(call, runner))


async def _answer_side_by_side(caller: "_Caller", requests: int, replies: int) -> None:
    ended, tasks = asyncio.Event(), set[asyncio.Task[None]]()

    async def answer(call: Call) -> None:
        write_answer(replies, await caller.call_async(call))

    def accept() -> None:
        call = read_message(requests)
        if call is None:
            ended.set()
            return
        task = asyncio.create_task(answer(call))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    asyncio.get_running_loop().add_reader(requests, accept)
    await ended.wait()


class _Caller:
    """Calls the user's function, and makes a reply of what it returns or raises."""

    def __init__(self, function: Callable[..., Any], path: Path, setup: Setup, shared: mmap.mmap) -> None:
        self._function, self._path, self._setup, self._shared = function, path, setup, shared
        call_method = getattr(type(function), "__call__", None)  # noqa: B004 - of an object, which may be async
        self.is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call_method)

    def call(self, call: Call, runner: asyncio.Runner) -> Reply:
        """Call a function that returns a score, or an awaitable of it."""
        self._mark(call.id)
        try:
            returned = self._begin(call)
            if inspect.isawaitable(returned):
                returned = runner.run(_awaited(returned))
            return self._reply(call.id, returned)
        except USER_ERRORS as error:
            return Reply(call.id, "function", user_traceback(error, self._path))
        finally:
            self._mark(0)
            bound_output()

    async def call_async(self, call: Call) -> Reply:
        """Call a coroutine function within the time limit."""
        limit = asyncio.timeout(self._setup.timeout_s)
        try:
            async with limit:
                returned = await _Marked(self._begin(call), call.id, self._mark)
            return self._reply(call.id, returned)
        except USER_ERRORS as error:
            if limit.expired() and isinstance(error, TimeoutError):
                return Reply(call.id, "timeout")
            return Reply(call.id, "function", user_traceback(error, self._path))
        finally:
            bound_output()

    def _begin(self, call: Call) -> Any:
        seed_random(call.seed)
        return self._function(**call.arguments, **self._setup.kwargs)

    def _mark(self, id: int) -> None:
        mark_running(self._shared, id)

    def _reply(self, id: int, returned: Any) -> Reply:
        try:
            score, components, info = parts_of_return(returned)
        except ReturnError as error:
            return Reply(id, "function", not_a_score(self._function, self._path, error))
        return Reply(id, score=score, components=components, info=_pickled(info))


class _Marked:
    """Awaits a coroutine, and marks it as running while it does not wait."""

    def __init__(self, coroutine: Awaitable[Any], id: int, mark: Callable[[int], None]) -> None:
        self._coroutine, self._id, self._mark = coroutine, id, mark

    def __await__(self) -> Generator[Any, Any, Any]:
        steps: Any = self._coroutine.__await__()
        resume, value = steps.send, None
        while True:
            self._mark(self._id)
            try:
                awaited = resume(value)
            except StopIteration as stop:
                return stop.value
            finally:
                self._mark(0)
            try:
                resume, value = steps.send, (yield awaited)
            except BaseException as error:
                resume, value = steps.throw, error


def not_a_score(function: Callable[..., Any], path: Path, error: ReturnError) -> str:
    """Describe a return value that is no score: the function, its file and valid return values."""
    return f"{name_of(function, path)} {error}. Return a finite number, or a dict with one as 'score'."


def finite_number(value: Any) -> float | None:
    """Convert a number or bool, also in an array or tensor of one element, to a float.

    Returns None for anything else, or if the number is not finite.
    """
    if not isinstance(value, Real | Decimal):
        return finite_number(_only_element(value)) if _is_array_of_one(value) else None
    try:
        number = float(value)
    except (OverflowError, ValueError):  # too large, or a signalling NaN
        return None
    return number if math.isfinite(number) and abs(number) <= MAX_SCORE else None


def _is_array_of_one(value: Any) -> bool:
    """Return whether a value is an array or tensor, of whatever library, with one element."""
    shape = getattr(value, "shape", None)
    try:
        return shape is not None and callable(getattr(value, "item", None)) and math.prod(shape) == 1
    except TypeError:
        return False


def _only_element(value: Any) -> Any:
    """Return the element of an array of one, as a Python object; None if its library cannot read it."""
    try:
        item = value.item()
    except Exception:  # of any library
        return None
    return item if isinstance(item, Real | Decimal) else None


def _pickled(info: dict[str, Any]) -> bytes:
    """Pickle what a function returned beside numbers; what cannot be pickled becomes text."""
    try:
        return pickle.dumps(info)
    except Exception:  # of the user's classes
        return pickle.dumps({key: _picklable(value) for key, value in info.items()})


def _picklable(value: Any) -> Any:
    try:
        pickle.dumps(value)
    except Exception:
        return short_repr(value)
    return value


async def _awaited(returned: Awaitable[Any]) -> Any:
    return await returned
