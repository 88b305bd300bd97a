"""KL-Cov: the policy gradient with a KL penalty on the few tokens that lower the entropy most.

With x = log π(token) - log π_old(token), A the token's advantage, and C as in `covariance`,

    L = -A exp(x)
    L = -A exp(x) + β |x|   for the k tokens of the largest C     Cui et al. 2025, arXiv:2505.22617

where k is `kl_cov_ratio` times the mini-batch's tokens, rounded down, but at least 1, and β is `ppo_kl_coef`; in the
paper 2e-3 to 2e-4, and 1. The ratio is not clipped, so there is no `pg_clipfrac`. As in verl, |x| is used as the KL
divergence, in the loss and in `ppo_kl`: it has no gradient at x = 0, so the penalty takes effect from the second update
of a step on.

Differences from verl: tokens are selected once over the whole mini-batch, while verl selects from each micro-batch, so
that the gradient depends on its size. Only a positive C counts. If several tokens share the k-th largest C, those
nearest to the beginning of their response come first, and those at the same position are selected together, so there
may be more than k. The log-ratio is clamped to ±20. A mini-batch of one token has C = 0, and no penalty.
"""

import torch
from torch import Tensor

from iiverl_core.algorithms.policy_losses.base import PolicyBatch, PolicyLossSettings
from iiverl_core.algorithms.policy_losses.covariance import (
    covariance,
    positions,
    selected_count,
    selected_tokens,
)


def kl_cov(batch: PolicyBatch, settings: PolicyLossSettings) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the loss of each token; the metric is |x|, the size of its log-ratio."""
    log_ratio_T, token_mask_T = batch.log_ratio_T, selected_tokens(batch)
    size_T = log_ratio_T.abs()
    penalty_T = (settings.ppo_kl_coef * size_T).masked_fill(~token_mask_T, 0)
    return -batch.advantages_T * log_ratio_T.exp() + penalty_T, {"ppo_kl": size_T.detach()}


@torch.no_grad()
def select_largest(batch: PolicyBatch, settings: PolicyLossSettings) -> Tensor:
    """Select the tokens of a mini-batch that get the KL penalty, (T,) bool."""
    covariance_T, position_T = covariance(batch), positions(batch)
    k = selected_count(settings.kl_cov_ratio, covariance_T.numel())
    threshold = covariance_T.topk(k).values[-1]
    above_T, tied_T = covariance_T > threshold, covariance_T == threshold
    last_position = position_T[tied_T].sort().values[k - 1 - above_T.sum()]
    return (above_T | (tied_T & (position_T <= last_position))) & (covariance_T > 0)
