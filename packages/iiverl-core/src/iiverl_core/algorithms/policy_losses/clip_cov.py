"""Clip-Cov: PPO's clipped loss without the gradient of a few tokens that would lower the entropy most.

With r = π(token) / π_old(token), A its advantage, and C as in `covariance`,

    L = max(-A r, -A clip(r, 1 - low, 1 + high))
    L = 0   for k tokens picked at random from those with lb < C < ub          Cui et al. 2025, arXiv:2505.22617

where k is `clip_cov_ratio` of the mini-batch's tokens, rounded down, but at least 1; in the paper 2e-4. As in verl,
tokens that PPO clips already are not picked, there is no dual clip, and `pg_clipfrac` counts the picked tokens alone.

What differs: tokens are picked once over the whole mini-batch, where verl picks from each micro-batch and the gradient
depends on its size. And the pick is repeatable: eligible tokens are ranked by C (and by position, where C is equal),
and a generator seeded with their number draws ranks. Tokens that share a rank are picked together, so there may be more
than k of them. A mini-batch of one token has C = 0, and PPO's loss.
"""

import torch
from torch import Tensor

from iiverl_core.algorithms.policy_losses.base import (
    PolicyBatch,
    PolicyLossSettings,
    clip_metrics,
    surrogates,
)
from iiverl_core.algorithms.policy_losses.covariance import covariance, how_many, positions, selected_tokens


def clip_cov(batch: PolicyBatch, settings: PolicyLossSettings) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of each token, and as metrics the tokens picked, and the KL from the old policy."""
    log_ratio_T, token_mask_T = batch.log_ratio_T, selected_tokens(batch)
    free_T, bound_T = surrogates(log_ratio_T.exp(), batch.advantages_T, settings)
    return torch.maximum(free_T, bound_T).masked_fill(token_mask_T, 0), clip_metrics(
        log_ratio_T, token_mask_T
    )


@torch.no_grad()
def select_at_random(batch: PolicyBatch, settings: PolicyLossSettings) -> Tensor:
    """Pick the tokens of a mini-batch that get no gradient, (T,) bool."""
    covariance_T = covariance(batch)
    free_T, bound_T = surrogates(batch.log_ratio_T.exp(), batch.advantages_T, settings)
    inside_T = (covariance_T > settings.clip_cov_lb) & (covariance_T < settings.clip_cov_ub)
    eligible_T = inside_T & ~(bound_T > free_T)
    keys = torch.stack((covariance_T, positions(batch).double()), dim=1)[eligible_T]
    ranks, rank_of, sizes = torch.unique(keys, dim=0, return_inverse=True, return_counts=True)

    generator = torch.Generator().manual_seed(len(ranks))
    drawn = torch.randperm(len(ranks), generator=generator).to(keys.device)
    picked_before = sizes[drawn].cumsum(0) - sizes[drawn]
    picked = torch.zeros_like(drawn, dtype=torch.bool)
    picked[drawn] = picked_before < how_many(settings.clip_cov_ratio, len(eligible_T))
    return torch.zeros_like(eligible_T).masked_scatter(eligible_T, picked[rank_of])
