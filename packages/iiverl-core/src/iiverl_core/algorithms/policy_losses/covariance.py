"""Covariance of advantage and log-prob per token, by which Clip-Cov and KL-Cov select tokens.

    C = (A - mean A) · (log π - mean log π)               Cui et al. 2025, arXiv:2505.22617

with the means over all tokens of the mini-batch. The entropy of a softmax policy decreases by the covariance of
log-prob and advantage, and few tokens account for most of it: likely tokens that are rewarded and unlikely tokens that
are punished. In a mini-batch of one token, or if all advantages are equal, C is 0.

The selection must not depend on the order of the samples. The means are therefore taken over sorted values, and ties in
C, which are common if the policy is certain (log π = 0), are broken by the token's position in the response. Two tokens
that agree in both are, barring coincidence, the same token after the same text; they are selected together or not at
all.
"""

import torch
from torch import Tensor

from iiverl_core.algorithms.policy_losses.base import PolicyBatch


def covariance(batch: PolicyBatch) -> Tensor:
    """Compute each token's contribution to the covariance of advantage and log-prob, (T,) fp64, without gradient."""
    return _centred(batch.advantages_T) * _centred(batch.log_probs_T)


def _centred(x_T: Tensor) -> Tensor:
    """Subtract the mean, in fp64, summed independently of the order of tokens."""
    x_T = x_T.detach().double()
    return x_T - x_T.sort().values.mean()


def positions(batch: PolicyBatch) -> Tensor:
    """Compute the position of each token in its response, from 0, (T,) int64."""
    segments = batch.segments
    starts_B = segments.last_B + 1 - segments.lengths_B
    return torch.arange(batch.log_probs_T.numel(), device=starts_B.device) - segments.expand(starts_B)


def selected_count(fraction: float, tokens: int) -> int:
    """Compute the number of tokens in a fraction of the mini-batch: rounded down, but at least one."""
    return min(max(int(fraction * tokens), 1), tokens)


def selected_tokens(batch: PolicyBatch) -> Tensor:
    """Return the tokens selected by `PolicyLoss.select_tokens`, (T,) bool.

    Raises:
        ValueError: no tokens have been selected.
    """
    if batch.token_mask_T is None:
        raise ValueError(
            "this policy loss works on tokens chosen over the whole mini-batch: call its `select_tokens` first, and give each "
            "micro-batch its part of the result as `token_mask_T`"
        )
    return batch.token_mask_T
