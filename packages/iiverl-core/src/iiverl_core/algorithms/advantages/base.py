"""Inputs and outputs of the advantage estimators."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from iiverl_core.algorithms.segments import Segments


@dataclass(frozen=True)
class AdvantageBatch:
    """The scored responses of a whole step.

    `rewards_T` is the reward of each token: the score on the last one, minus a KL penalty on each if KL is part of
    the reward. `group_B` (int64, 0 … G-1) is the index of each response's prompt. Responses without a score are not
    included.

    `values_T` is the critic's estimate, before each token is sampled, of the rewards from that token on; None without a
    critic. `baseline_B` is the score of the greedy response to the same prompt; None unless the estimator requests it.
    """

    rewards_T: Tensor
    segments: Segments
    group_B: Tensor
    values_T: Tensor | None = None
    baseline_B: Tensor | None = None


@dataclass(frozen=True)
class AdvantageSettings:
    """Options of the estimators: the discount `gamma` of a reward one token later, GAE's `lam`, and whether GRPO
    and its pass@k variant divide by the group's standard deviation (Dr. GRPO does not)."""

    gamma: float = 1.0
    lam: float = 1.0
    norm_by_std: bool = True


EstimatorFunction: TypeAlias = Callable[[AdvantageBatch, AdvantageSettings], tuple[Tensor, Tensor]]
"""Returns the advantage and the return of each token, `(advantages_T, returns_T)`."""


@dataclass(frozen=True)
class Estimator:
    """An advantage estimator and its requirements.

    Groups with fewer scored responses than `min_group_size` are dropped from the step. With `greedy_baseline`, each
    prompt gets an additional response, decoded greedily, whose score is the group's baseline. With `per_group`, the
    advantages of a group depend on no other group of the step.
    """

    function: EstimatorFunction
    min_group_size: int = 1
    greedy_baseline: bool = False
    per_group: bool = False

    def __call__(self, batch: AdvantageBatch, settings: AdvantageSettings) -> tuple[Tensor, Tensor]:
        """Compute the advantage and the return of each token, (T,) each."""
        return self.function(batch, settings)
