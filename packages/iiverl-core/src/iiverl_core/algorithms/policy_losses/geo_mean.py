"""GMPO: one ratio for a whole response, the geometric mean of its tokens' clipped ratios.

With x = log π(token) - log π_old(token), A the response's advantage, and the mean over its tokens,

    y = sign(A) min(sign(A) x, sign(A) clip(x, -low, high))
    L = -A exp(mean y)                                    Zhao et al. 2025, arXiv:2507.20673

the same for each token of the response. The bounds apply to log-ratios, so ratios stay within (exp(-low), exp(high));
the paper uses 0.4 for both. A geometric mean is less sensitive to outlier tokens than the arithmetic mean of GRPO. The
mean over responses (`seq-mean-token-mean`, since the tokens of a response share a loss) is part of the algorithm.

In the paper a response has one advantage; if advantages differ between tokens, as with GAE, each token is clipped by
the sign of its own, and A is their mean, as in verl. A log-ratio beyond ±20 is clamped and has no gradient. As in verl,
`pg_clipfrac` counts the tokens of positive advantage outside the bounds, `pg_clipfrac_lower` those of negative
advantage, although tokens on one side of the bounds keep their gradient. A response of one token gets PPO's loss,
clipped in log-ratios.
"""

import torch
from torch import Tensor

from iiverl_core.algorithms.policy_losses.base import PolicyBatch, PolicyLossSettings, clip_metrics


def geo_mean(batch: PolicyBatch, settings: PolicyLossSettings) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the loss of each token; metrics are the tokens out of bounds, by sign of advantage, and the KL from the
    old policy."""
    log_ratio_T, advantages_T, segments = batch.log_ratio_T, batch.advantages_T, batch.segments
    bounded_T = log_ratio_T.clamp(-settings.clip_low, settings.clip_high)
    sign_T = advantages_T.sign()
    kept_T = sign_T * torch.minimum(sign_T * log_ratio_T, sign_T * bounded_T)
    losses_B = -segments.mean(advantages_T) * segments.mean(kept_T).exp()
    out_of_bounds_T = bounded_T != log_ratio_T
    metrics = clip_metrics(
        log_ratio_T, out_of_bounds_T & (advantages_T > 0), out_of_bounds_T & (advantages_T < 0)
    )
    return segments.expand(losses_B), metrics
