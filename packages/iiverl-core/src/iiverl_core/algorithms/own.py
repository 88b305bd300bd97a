"""Finding an algorithm by what the YAML file calls it: a built-in name, or a user's own in a file.

An own one is named `path/to/file.py:name`. It is a function like the built-in ones,

    def centred(batch, settings): …              an estimator: (advantages_T, returns_T), both (T,)
    def reinforce(batch, settings): …            a policy loss: losses_T (T,), and metrics by name, (T,) each

or, where the algorithm asks more of a step than that, an object: `Estimator(centred, smallest_group=2)`,
`PolicyLoss(reinforce, choose=…)`. `docs/functions.md` explains the arguments, with an example of each.
"""

import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any, TypeVar

from iiverl_core.algorithms.advantages import ADVANTAGES, Estimator
from iiverl_core.algorithms.aggregation import AGGREGATIONS
from iiverl_core.algorithms.policy_losses import POLICY_LOSSES, PolicyLoss
from iiverl_core.algorithms.returns import checked_estimator, checked_policy_loss
from iiverl_core.config.sections.actor import LOSS_MODE as POLICY_LOSS_KEY
from iiverl_core.config.sections.algorithm import ADV_ESTIMATOR as ESTIMATOR_KEY
from iiverl_core.errors import ConfigError
from iiverl_core.python_files import find_callable, load_file, split_place

Algorithm = TypeVar("Algorithm", Estimator, PolicyLoss)


def find_estimator(name: str) -> Estimator:
    """Find an advantage estimator: a built-in one, or the user's at `path/to/file.py:name`.

    Raises:
        ConfigError: there is none of this name, the user's file cannot be loaded, or what it holds there is neither an
            `Estimator` nor a function of a batch and settings.
    """
    estimator = _find(name, ADVANTAGES, Estimator, ESTIMATOR_KEY, "advantage estimator")
    if estimator.smallest_group < 1:
        raise ConfigError(
            f"{ESTIMATOR_KEY}: {name} has smallest_group {estimator.smallest_group}; it is at least 1"
        )
    return estimator


def find_policy_loss(name: str) -> PolicyLoss:
    """Find a policy loss: a built-in one, or the user's at `path/to/file.py:name`.

    Raises:
        ConfigError: there is none of this name, the user's file cannot be loaded, or what it holds there is neither a
            `PolicyLoss` nor a function of a batch and settings.
    """
    loss = _find(name, POLICY_LOSSES, PolicyLoss, POLICY_LOSS_KEY, "policy loss")
    if loss.loss_agg_mode not in (None, *AGGREGATIONS):
        raise ConfigError(
            f"{POLICY_LOSS_KEY}: {name} has loss_agg_mode {loss.loss_agg_mode!r}; it is one of "
            f"{', '.join(AGGREGATIONS)}, or None for the configuration's"
        )
    return loss


def _find(
    name: str, built_in: Mapping[str, Algorithm], kind: type[Algorithm], key: str, what: str
) -> Algorithm:
    if name in built_in:
        return built_in[name]
    place = split_place(name)
    if place is None:
        near = get_close_matches(name, built_in, n=1)
        raise ConfigError(
            f"{key}: there is no {what} {name!r}{f'; did you mean {near[0]}?' if near else '.'} "
            f"There are {', '.join(built_in)}, and your own as path/to/file.py:name."
        )
    file, in_file = place
    path, module = load_file(file, key)
    if not in_file:
        raise ConfigError(
            f"{key}: {name!r} names a file; name the {what} in it too, as in {name.rstrip(':')}:my_own"
        )
    found = find_callable(path, module, in_file, key)
    where = f"{key}: {in_file} in {path}"
    algorithm = _as(kind, found, where)
    if isinstance(algorithm, Estimator):
        return checked_estimator(algorithm, where, path)
    if algorithm.choose is not None:
        _check_arguments(algorithm.choose, f"{key}: choose of {name}")
    return checked_policy_loss(algorithm, where, path)


def _as(kind: type[Algorithm], found: Callable[..., Any], where: str) -> Algorithm:
    """Make an algorithm of what a user's file holds, and see that it takes what it will be given."""
    if isinstance(found, kind):
        _check_arguments(found.function, where)
        return found
    if isinstance(found, Estimator | PolicyLoss | type):
        is_now = "a class" if isinstance(found, type) else f"an object of {type(found).__name__}"
        raise ConfigError(
            f"{where} is {is_now}; here goes a function of a batch and settings, or an object of {kind.__name__}"
        )
    _check_arguments(found, where)
    return kind(found)


def _check_arguments(function: Callable[..., Any], where: str) -> None:
    """See that a function can be called with a batch and settings."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions written in C have none to look at
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        raise ConfigError(
            f"{where} takes {signature} and cannot be called with the two arguments that it gets: {error}. Define it "
            "with (batch, settings)."
        ) from error
