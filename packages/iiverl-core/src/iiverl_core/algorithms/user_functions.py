"""Find algorithms by their name in the YAML file: a name of the registry, or a user function.

A user function is named `path/to/file.py:name`. It has the same signature as the built-in ones,

    def centred(batch, settings): …              an estimator: (advantages_T, returns_T), both (T,)
    def reinforce(batch, settings): …            a policy loss: losses_T (T,), and metrics by name, (T,) each

or, if the algorithm has further requirements, it is an object: `Estimator(centred, min_group_size=2)`,
`PolicyLoss(reinforce, select_tokens=…)`. `docs/functions.md` explains the arguments, with an example of each.
"""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from iiverl_core.algorithms.advantages import Estimator
from iiverl_core.algorithms.policy_losses import PolicyLoss
from iiverl_core.algorithms.returns import checked_estimator, checked_policy_loss
from iiverl_core.config.sections.section import ADV_ESTIMATOR as ESTIMATOR_KEY
from iiverl_core.config.sections.section import LOSS_MODE as POLICY_LOSS_KEY
from iiverl_core.errors import ConfigError
from iiverl_core.python_files import find_callable, load_file, split_function_name
from iiverl_core.registry import AGGREGATIONS, ESTIMATORS, POLICY_LOSSES

USER_FUNCTION = ", and your own as path/to/file.py:name"

Algorithm = TypeVar("Algorithm", Estimator, PolicyLoss)


def find_estimator(name: str) -> Estimator:
    """Find an advantage estimator: one of the registry, or a user function `path/to/file.py:name`.

    Raises:
        ConfigError: the name is unknown, the user's file cannot be loaded, or the object in it is neither
            an `Estimator` nor a function of a batch and settings.
    """
    if split_function_name(name) is None:
        info = ESTIMATORS.find(name, ESTIMATOR_KEY, also=USER_FUNCTION)
        estimator = Estimator(info.load(), info.min_group_size, info.greedy_baseline, info.per_group)
    else:
        estimator = _from_file(name, Estimator, ESTIMATOR_KEY, ESTIMATORS.label)
    if estimator.min_group_size < 1:
        raise ConfigError(
            f"{ESTIMATOR_KEY}: {name} has min_group_size {estimator.min_group_size}; it is at least 1"
        )
    return estimator


def find_policy_loss(name: str) -> PolicyLoss:
    """Find a policy loss: one of the registry, or a user function `path/to/file.py:name`.

    Raises:
        ConfigError: the name is unknown, the user's file cannot be loaded, or the object in it is neither
            a `PolicyLoss` nor a function of a batch and settings.
    """
    if split_function_name(name) is None:
        info = POLICY_LOSSES.find(name, POLICY_LOSS_KEY, also=USER_FUNCTION)
        loss = PolicyLoss(info.load(), info.load_select_tokens(), info.loss_agg_mode)
    else:
        loss = _from_file(name, PolicyLoss, POLICY_LOSS_KEY, POLICY_LOSSES.label)
    if loss.loss_agg_mode is not None and loss.loss_agg_mode not in AGGREGATIONS:
        raise ConfigError(
            f"{POLICY_LOSS_KEY}: {name} has loss_agg_mode {loss.loss_agg_mode!r}; it is one of "
            f"{', '.join(AGGREGATIONS)}, or None for the configuration's"
        )
    return loss


def _from_file(name: str, kind: type[Algorithm], key: str, label: str) -> Algorithm:
    """Load the algorithm `path/to/file.py:name` from the user's file."""
    file, in_file = split_function_name(name) or ("", "")
    path, module = load_file(file, key)
    if not in_file:
        raise ConfigError(
            f"{key}: {name!r} names a file; name the {label} in it too, as in {name.rstrip(':')}:my_own"
        )
    found = find_callable(path, module, in_file, key)
    where = f"{key}: {in_file} in {path}"
    algorithm = _to_algorithm(kind, found, where)
    if isinstance(algorithm, Estimator):
        return checked_estimator(algorithm, where, path)
    if algorithm.select_tokens is not None:
        _check_arguments(algorithm.select_tokens, f"{key}: select_tokens of {name}")
    return checked_policy_loss(algorithm, where, path)


def _to_algorithm(kind: type[Algorithm], found: Callable[..., Any], where: str) -> Algorithm:
    """Convert an object of a user's file to an algorithm, and check that it takes a batch and settings."""
    if isinstance(found, kind):
        _check_arguments(found.function, where)
        return found
    if isinstance(found, Estimator | PolicyLoss | type):
        actual = "a class" if isinstance(found, type) else f"an object of {type(found).__name__}"
        raise ConfigError(
            f"{where} is {actual}; here goes a function of a batch and settings, or an object of {kind.__name__}"
        )
    _check_arguments(found, where)
    return kind(found)


def _check_arguments(function: Callable[..., Any], where: str) -> None:
    """Check that a function can be called with a batch and settings."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions written in C have no signature
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        raise ConfigError(
            f"{where} takes {signature} and cannot be called with the two arguments that it gets: {error}. Define it "
            "with (batch, settings)."
        ) from error
