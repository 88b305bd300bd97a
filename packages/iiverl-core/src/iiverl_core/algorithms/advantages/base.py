"""What every advantage estimator takes and gives."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from iiverl_core.algorithms.segments import Segments


@dataclass(frozen=True)
class AdvantageBatch:
    """The scored responses of a whole step.

    `rewards_T` is the reward of each token: the score on the last one, less a KL penalty on each where KL goes into
    the reward. `group_B` (int64, 0 … G-1) says which prompt each response answers. Responses without a score are not
    in here.
    """

    rewards_T: Tensor
    segments: Segments
    group_B: Tensor


@dataclass(frozen=True)
class AdvantageSettings:
    """Options of the estimators: divide by the group's standard deviation (GRPO), or not (Dr. GRPO)."""

    norm_by_std: bool = True


AdvantageEstimator: TypeAlias = Callable[[AdvantageBatch, AdvantageSettings], tuple[Tensor, Tensor]]
"""Gives the advantage and the return of each token, `(advantages_T, returns_T)`."""
