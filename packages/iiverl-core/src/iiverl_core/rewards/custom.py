"""Load a user's reward function from its file, and turn what it returns or raises into an outcome."""

import inspect
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from iiverl_core.columns import extra_info_of
from iiverl_core.config import CustomRewardFunctionConfig
from iiverl_core.config.sections.rewards import REWARD_ARGUMENTS
from iiverl_core.errors import ConfigError
from iiverl_core.python_files import (
    call_problem,
    find_callable,
    load_file,
    user_traceback,
)
from iiverl_core.reward_process import ReturnError, not_a_score, parts_of_return
from iiverl_core.samples import Rollout
from iiverl_core.user_process import USER_ERRORS
from iiverl_reward_client import Failed, Outcome, Scored

_SIGNALS = (
    "it called signal.signal, which Python allows on the main thread only, and with custom_reward_function.workers: 0 "
    "reward functions run on another thread; a score that it returned nevertheless cannot be trusted. Use another number of "
    "workers, or, with Math-Verify, turn its timeouts off: parse(…, parsing_timeout=None), verify(…, timeout_seconds=None)"
)


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
        try:
            with noticed_signal_use() as signal_use:
                returned = self.function(**arguments_of(rollout), **self.kwargs)
        except USER_ERRORS as error:
            return Failed("function", detail=user_traceback(error, self.path))
        if signal_use:
            return Failed("function", detail=_SIGNALS)
        return self._awaited(returned) if inspect.isawaitable(returned) else self._outcome(returned)

    async def _awaited(self, returned: Awaitable[Any]) -> Outcome:
        try:
            with noticed_signal_use() as signal_use:
                value = await returned
        except USER_ERRORS as error:
            return Failed("function", detail=user_traceback(error, self.path))
        return Failed("function", detail=_SIGNALS) if signal_use else self._outcome(value)

    def _outcome(self, returned: Any) -> Outcome:
        """Turn the return value into an outcome; a failure names the function, its file and valid return values."""
        try:
            return Scored(*parts_of_return(returned))
        except ReturnError as error:
            return Failed("function", detail=not_a_score(self.function, self.path, error))


def arguments_of(rollout: Rollout) -> dict[str, Any]:
    """Return the keyword arguments of a reward function, without the user's own (`REWARD_ARGUMENTS`).

    With several turns, `extra_info["messages"]` is the whole conversation.
    """
    prompt, extra_info = rollout.prompt, extra_info_of(rollout.prompt.columns)
    if rollout.messages is not None and (extra_info is None or isinstance(extra_info, Mapping)):
        extra_info = {**(extra_info or {}), "messages": [dict(message) for message in rollout.messages]}
    return {
        "data_source": prompt.data_source,
        "solution_str": rollout.text,
        "ground_truth": prompt.ground_truth,
        "extra_info": extra_info,
    }


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
