"""Load a user's reward function from its file, and turn what it returns or raises into an outcome."""

import asyncio
import inspect
import math
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from iiverl_core.columns import extra_info_of
from iiverl_core.config import CustomRewardFunctionConfig
from iiverl_core.config.sections.rewards import REWARD_ARGUMENTS
from iiverl_core.errors import ConfigError
from iiverl_core.python_files import (
    call_problem,
    find_callable,
    load_file,
    repr_with_type,
    short_repr,
    user_traceback,
)
from iiverl_core.samples import Rollout
from iiverl_reward_client import Failed, Outcome, Scored

_SIGNALS = (
    "it called signal.signal, which Python allows on the main thread only, and reward functions run on another thread; "
    "a score that it returned nevertheless cannot be trusted. With Math-Verify, turn its timeouts off: "
    "parse(…, parsing_timeout=None), verify(…, timeout_seconds=None)"
)

MAX_SCORE = float(np.finfo(np.float32).max)
"""Largest score: advantages are computed in fp32, in which a larger one is infinite."""

# Exceptions of user code that must not end the program.
_USER_ERRORS = (Exception, SystemExit, asyncio.CancelledError)


@dataclass(frozen=True, slots=True)
class CustomFunction:
    """Scores a rollout with a user's `function`, defined in the file at `path`.

    The function is called with the keywords `data_source`, `solution_str` (the response), `ground_truth`, `extra_info`
    (the row's other columns, see `extra_info_of`), and `kwargs`.
    """

    function: Callable[..., Any]
    path: Path
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def takes_ground_truth(self) -> bool:
        """Whether the function has a parameter `ground_truth`; `**kwargs` does not count."""
        signature = _signature(self.function)
        return signature is not None and "ground_truth" in signature.parameters

    def __call__(self, rollout: Rollout) -> Outcome | Awaitable[Outcome]:
        """Return the outcome, or an awaitable of it if the function is a coroutine function; user errors never raise."""
        prompt = rollout.prompt
        try:
            with noticed_signal_use() as signal_use:
                returned = self.function(
                    data_source=prompt.data_source,
                    solution_str=rollout.text,
                    ground_truth=prompt.ground_truth,
                    extra_info=extra_info_of(prompt.columns),
                    **self.kwargs,
                )
        except _USER_ERRORS as error:
            return Failed("function", detail=user_traceback(error, self.path))
        if signal_use:
            return Failed("function", detail=_SIGNALS)
        return self._awaited(returned) if inspect.isawaitable(returned) else self._outcome(returned)

    async def _awaited(self, returned: Awaitable[Any]) -> Outcome:
        try:
            with noticed_signal_use() as signal_use:
                value = await returned
        except _USER_ERRORS as error:
            return Failed("function", detail=user_traceback(error, self.path))
        return Failed("function", detail=_SIGNALS) if signal_use else self._outcome(value)

    def _outcome(self, returned: Any) -> Outcome:
        """Turn the return value into an outcome; a failure names the function, its file and valid return values."""
        outcome = outcome_of_return(returned)
        if not isinstance(outcome, Failed):
            return outcome
        name = getattr(self.function, "__name__", type(self.function).__name__)
        return Failed(
            "function",
            detail=f"{name} in {self.path} {outcome.detail}. Return a finite number, or a dict with one as 'score'.",
        )


def load_custom_function(config: CustomRewardFunctionConfig) -> CustomFunction:
    """Load the function that `custom_reward_function.{path,name,reward_kwargs}` describe.

    Raises:
        ConfigError: there is no such file or function, importing the file fails, or the function cannot be called with
            these arguments.
    """
    if config.path is None:
        raise ConfigError("custom_reward_function.path is not set: there is no function to load")
    path, module = load_file(config.path, "custom_reward_function.path")
    function = find_callable(path, module, config.name, "custom_reward_function.name")
    _check_signature(function, config, path)
    return CustomFunction(function, path, config.reward_kwargs)


def outcome_of_return(returned: Any) -> Outcome:
    """Turn the return value of a reward function into an outcome.

    A finite number is the score, also in an array or tensor of one element. So is `score` of a mapping, whose other finite numbers become `components` and the
    rest `info`. Anything else is a failure that names the return value.
    """
    if not isinstance(returned, Mapping):
        score = _number(returned)
        if score is None:
            return Failed(
                "function",
                detail=f"returned {repr_with_type(returned)}, which is not a finite number that fp32 can hold",
            )
        return Scored(score)
    if "score" not in returned:
        keys = ", ".join(short_repr(key) for key in list(returned)[:10]) or "none"
        return Failed("function", detail=f"returned a dict without 'score'; its keys: {keys}")
    score = _number(returned["score"])
    if score is None:
        detail = (
            f"returned a dict whose 'score' is {repr_with_type(returned['score'])}, which is not a finite number that fp32 "
            "can hold"
        )
        return Failed("function", detail=detail)
    components: dict[str, float] = {}
    info: dict[str, Any] = {}
    for key, value in returned.items():
        if key == "score":
            continue
        number = _number(value)
        if number is None:
            info[str(key)] = value
        else:
            components[str(key)] = number
    return Scored(score, components, info)


def _number(value: Any) -> float | None:
    """Convert a number or bool, also in an array or tensor of one element, to a float.

    Returns None for anything else, or if the number is not finite.
    """
    if not isinstance(value, Real | Decimal | np.bool_):
        return _number(_only_element(value)) if _is_array_of_one(value) else None
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


def _check_signature(function: Callable[..., Any], config: CustomRewardFunctionConfig, path: Path) -> None:
    if clash := sorted(set(config.reward_kwargs) & set(REWARD_ARGUMENTS)):
        raise ConfigError(
            f"custom_reward_function.reward_kwargs: {', '.join(clash)} cannot be set here; "
            "each sample has its own"
        )
    signature = _signature(function)
    arguments = (*REWARD_ARGUMENTS, *config.reward_kwargs)
    if signature and (problem := call_problem(signature, config.name, path, arguments)):
        raise ConfigError(f"custom_reward_function.name: {problem}")


def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    """Return a function's signature; None for functions written in C that have none."""
    try:
        return inspect.signature(function)
    except ValueError:
        return None


@contextmanager
def noticed_signal_use() -> Iterator[list[str]]:
    """Yield a list of the threads, other than the main one, that call `signal.signal` within the block.

    Timeouts based on signals, such as Math-Verify's default, raise ValueError there; libraries that catch it return
    "not equal", which would be scored as 0 like any wrong answer. So the call itself has to be noticed.
    """
    threads: list[str] = []
    set_handler = signal.signal

    def noticing(*args: Any, **kwargs: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            threads.append(threading.current_thread().name)
        return set_handler(*args, **kwargs)

    signal.signal = noticing
    try:
        yield threads
    finally:
        signal.signal = set_handler
