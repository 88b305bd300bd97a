"""What every policy loss takes and gives."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from iiverl_core.algorithms.segments import Segments


@dataclass(frozen=True)
class PolicyLossSettings:
    """Options of the policy losses: how far the ratio may fall (`clip_low`) and rise (`clip_high`), and dual clip."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    clip_dual: float = 3.0


PolicyLoss: TypeAlias = Callable[
    [Tensor, Tensor, Tensor, Segments, PolicyLossSettings], tuple[Tensor, dict[str, Tensor]]
]
"""`(log_probs_T, old_log_probs_T, advantages_T, segments, settings)` → the loss of each token, (T,), and metrics of
each token, (T,), whose mean over all tokens is reported under `actor/`."""
