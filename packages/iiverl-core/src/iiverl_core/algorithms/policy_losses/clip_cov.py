"""Clip-Cov: PPO's clipped loss without the gradient of a few of the tokens that lower the entropy most.

With r = π(token) / π_old(token), A its advantage, and C as in `covariance`,

    L = max(-A r, -A clip(r, 1 - low, 1 + high))
    L = 0   for k tokens selected at random from those with lb < C < ub        Cui et al. 2025, arXiv:2505.22617

where k is `clip_cov_ratio` times the mini-batch's tokens, rounded down, but at least 1; in the paper 2e-4. As in verl,
tokens that PPO already clips are not selected, there is no dual clip, and `pg_clipfrac` counts only the selected
tokens.

Differences from verl: tokens are selected once over the whole mini-batch, while verl selects from each micro-batch, so
that the gradient depends on its size. The selection is also reproducible: eligible tokens are ranked by C (ties by
position), and a generator seeded with the number of ranks selects ranks. Tokens that share a rank are selected
together, so there may be more than k of them. A mini-batch of one token has C = 0, and PPO's loss.
"""

import torch
from torch import Tensor

from iiverl_core.algorithms.policy_losses.base import (
    PolicyBatch,
    PolicyLossSettings,
    clip_metrics,
    surrogates,
)
from iiverl_core.algorithms.policy_losses.covariance import (
    covariance,
    positions,
    selected_count,
    selected_tokens,
)


def clip_cov(batch: PolicyBatch, settings: PolicyLossSettings) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the loss of each token; metrics are the selected tokens and the KL from the old policy."""
    log_ratio_T, token_mask_T = batch.log_ratio_T, selected_tokens(batch)
    unclipped_T, clipped_T = surrogates(log_ratio_T.exp(), batch.advantages_T, settings)
    return torch.maximum(unclipped_T, clipped_T).masked_fill(token_mask_T, 0), clip_metrics(
        log_ratio_T, token_mask_T
    )


@torch.no_grad()
def select_at_random(batch: PolicyBatch, settings: PolicyLossSettings) -> Tensor:
    """Select the tokens of a mini-batch that get no gradient, (T,) bool."""
    covariance_T = covariance(batch)
    unclipped_T, clipped_T = surrogates(batch.log_ratio_T.exp(), batch.advantages_T, settings)
    inside_T = (covariance_T > settings.clip_cov_lb) & (covariance_T < settings.clip_cov_ub)
    eligible_T = inside_T & ~(clipped_T > unclipped_T)
    keys = torch.stack((covariance_T, positions(batch).double()), dim=1)[eligible_T]
    ranks, rank_of, sizes = torch.unique(keys, dim=0, return_inverse=True, return_counts=True)

    generator = torch.Generator().manual_seed(len(ranks))
    order = torch.randperm(len(ranks), generator=generator).to(keys.device)
    selected_before = sizes[order].cumsum(0) - sizes[order]
    selected = torch.zeros_like(order, dtype=torch.bool)
    selected[order] = selected_before < selected_count(settings.clip_cov_ratio, len(eligible_T))
    return torch.zeros_like(eligible_T).masked_scatter(eligible_T, selected[rank_of])
