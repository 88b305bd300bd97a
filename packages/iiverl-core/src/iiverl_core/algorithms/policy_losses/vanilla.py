"""PPO's clipped loss, with dual clip and clip-higher.

With r = π(token) / π_old(token) and A its advantage,

    L = max(-A r, -A clip(r, 1 - low, 1 + high))                 Schulman et al. 2017, arXiv:1707.06347, eq. 7
    L = min(L, -A dual)                          where A < 0     Ye et al. 2020, arXiv:1912.09729, eq. 5

`low` and `high` differ in DAPO's clip-higher (Yu et al. 2025, arXiv:2503.14476, section 3.1). Without dual clip, the
loss of a token with negative advantage and a large ratio is unbounded. The log-ratio is clamped to ±20 so that
its exponential stays finite in fp32. Tokens are independent: a response of one token is not a special case.
"""

import torch
from torch import Tensor

from iiverl_core.algorithms.policy_losses.base import (
    PolicyBatch,
    PolicyLossSettings,
    clip_metrics,
    surrogates,
)


def vanilla(batch: PolicyBatch, settings: PolicyLossSettings) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the loss of each token; metrics are tokens clipped, also by dual clip, and the KL from the old policy."""
    log_ratio_T, advantages_T = batch.log_ratio_T, batch.advantages_T
    unclipped_T, bounded_T = surrogates(log_ratio_T.exp(), advantages_T, settings)
    clipped_T = torch.maximum(unclipped_T, bounded_T)
    dual_T = -advantages_T * settings.clip_dual
    negative_T = advantages_T < 0
    losses_T = torch.where(negative_T, torch.minimum(clipped_T, dual_T), clipped_T)
    return losses_T, clip_metrics(log_ratio_T, bounded_T > unclipped_T, (clipped_T > dual_T) & negative_T)
