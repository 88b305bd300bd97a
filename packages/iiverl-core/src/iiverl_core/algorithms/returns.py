"""Check user algorithms when they are called: an exception or an invalid return value becomes one message."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iiverl_core.algorithms.advantages import AdvantageBatch, Estimator
from iiverl_core.algorithms.policy_losses import PolicyBatch, PolicyLoss
from iiverl_core.errors import ConfigError
from iiverl_core.python_files import repr_with_type, user_traceback

Check = Callable[[Any, Any], str | None]
"""Takes the batch and the return value; returns what is wrong with it, or None."""


@dataclass(frozen=True)
class CheckedFunction:
    """A user's `function` of a batch and settings, from the file at `path`; `place` begins each message.

    `expected` describes a valid return value, and `check` finds what is wrong with one.
    """

    function: Callable[..., Any]
    place: str
    path: Path
    expected: str
    check: Check

    def __call__(self, batch: Any, settings: Any) -> Any:
        """Call the function and return its result.

        Raises:
            ConfigError: the function raised, or its return value is invalid.
        """
        try:
            returned = self.function(batch, settings)
        except (Exception, SystemExit) as error:
            raise ConfigError(f"{self.place} failed.\n{user_traceback(error, self.path)}") from error
        if wrong := self.check(batch, returned):
            raise ConfigError(f"{self.place} returned {wrong}.\nIt has to return {self.expected}.")
        return returned


def checked_estimator(estimator: Estimator, place: str, path: Path) -> Estimator:
    """Wrap a user's estimator so that every return value is checked."""
    expected = "(advantages_T, returns_T): two tensors of finite floats, one number per response token each"
    return replace(
        estimator, function=CheckedFunction(estimator.function, place, path, expected, _wrong_estimate)
    )


def checked_policy_loss(loss: PolicyLoss, place: str, path: Path) -> PolicyLoss:
    """Wrap a user's policy loss, and its selection of tokens, so that every return value is checked."""
    expected = (
        "(losses_T, metrics): a tensor of finite floats, one loss per response token, computed from batch.log_probs_T; "
        "and a dict of tensors of the same shape by name, {} for no metrics"
    )
    mask = "a bool tensor, one truth value per response token"
    select = loss.select_tokens and CheckedFunction(
        loss.select_tokens, f"{place}, select_tokens,", path, mask, _wrong_mask
    )
    function = CheckedFunction(loss.function, place, path, expected, _wrong_loss)
    return replace(loss, function=function, select_tokens=select)


def _wrong_estimate(batch: AdvantageBatch, returned: Any) -> str | None:
    names = ("advantages_T", "returns_T")
    if wrong := _wrong_pair(returned):
        return wrong
    for name, x_T in zip(names, returned, strict=True):
        if wrong := _wrong_tensor(x_T, batch.rewards_T):
            return f"{wrong} as {name}"
    return None


def _wrong_loss(batch: PolicyBatch, returned: Any) -> str | None:
    if wrong := _wrong_pair(returned):
        return wrong
    losses_T, metrics = returned
    if wrong := _wrong_tensor(losses_T, batch.log_probs_T):
        return f"{wrong} as losses_T"
    if batch.log_probs_T.requires_grad and not losses_T.requires_grad:
        return "losses_T without a gradient: they do not depend on batch.log_probs_T"
    if not isinstance(metrics, Mapping):
        return f"{_describe(metrics)} as metrics"
    for name, x_T in metrics.items():
        if not isinstance(name, str):
            return f"metrics with the name {repr_with_type(name)}"
        if not isinstance(x_T, Tensor) or x_T.shape != batch.log_probs_T.shape:
            return f"{_describe(x_T)} as metric {name!r}{_for_tokens(batch.log_probs_T)}"
    return None


def _wrong_mask(batch: PolicyBatch, returned: Any) -> str | None:
    if not isinstance(returned, Tensor) or returned.shape != batch.log_probs_T.shape:
        return f"{_describe(returned)}{_for_tokens(batch.log_probs_T)}"
    return None if returned.dtype == torch.bool else _describe(returned)


def _wrong_pair(returned: Any) -> str | None:
    if not isinstance(returned, tuple | list):
        return _describe(returned)
    if len(returned) == 2:
        return None
    return (
        f"a {type(returned).__name__} of {len(returned)}: {', '.join(map(_describe, returned)) or 'nothing'}"
    )


def _wrong_tensor(x_T: Any, like_T: Tensor) -> str | None:
    """Describe what keeps a value from being finite floats of the shape of `like_T`; None if nothing does."""
    if not isinstance(x_T, Tensor) or x_T.shape != like_T.shape:
        return f"{_describe(x_T)}{_for_tokens(like_T)}"
    if not x_T.is_floating_point():
        return _describe(x_T)
    bad = int((~x_T.isfinite()).sum())
    if not bad:
        return None
    kinds = "NaN" if bool(x_T.isnan().any()) else "infinite"
    return f"{kinds} for {bad} of {x_T.numel()} tokens"


def _for_tokens(like_T: Tensor) -> str:
    return f" for {like_T.numel()} tokens"


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    return repr_with_type(value)
