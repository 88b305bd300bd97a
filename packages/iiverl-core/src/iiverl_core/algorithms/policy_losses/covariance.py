"""How much each token lowers the policy's entropy: what Clip-Cov and KL-Cov choose tokens by.

    C = (A - mean A) · (log π - mean log π)               Cui et al. 2025, arXiv:2505.22617

with the means over all tokens of the mini-batch. The entropy of a softmax policy falls by the covariance of log-prob
and advantage, and few tokens make up most of that: likely ones that are rewarded and unlikely ones that are punished.
In a mini-batch of one token, or where all advantages are equal, C is 0.

Choices by C must not depend on the order of the samples. So the means are taken over sorted values, and tokens of the
same C, which are common where the policy is sure of itself (log π = 0), are told apart by their position in the
response. Two tokens that agree in both are, but for chance, the same token after the same text; they are chosen or left
together.
"""

import torch
from torch import Tensor

from iiverl_core.algorithms.policy_losses.base import PolicyBatch


def covariance(batch: PolicyBatch) -> Tensor:
    """Each token's share in the covariance of advantage and log-prob, (T,) fp64, without gradient."""
    return _centred(batch.advantages_T) * _centred(batch.log_probs_T)


def _centred(x_T: Tensor) -> Tensor:
    """Subtract the mean, in fp64, summed in an order that the order of tokens has no part in."""
    x_T = x_T.detach().double()
    return x_T - x_T.sort().values.mean()


def positions(batch: PolicyBatch) -> Tensor:
    """The position of each token in its response, from 0, (T,) int64."""
    segments = batch.segments
    starts_B = segments.last_B + 1 - segments.lengths_B
    return torch.arange(batch.log_probs_T.numel(), device=starts_B.device) - segments.expand(starts_B)


def how_many(share: float, tokens: int) -> int:
    """How many tokens a share of the mini-batch comes to: rounded down, but at least one."""
    return min(max(int(share * tokens), 1), tokens)


def selected_tokens(batch: PolicyBatch) -> Tensor:
    """The tokens that `PolicyLoss.select_tokens` picked, (T,) bool.

    Raises:
        ValueError: nothing has been chosen.
    """
    if batch.token_mask_T is None:
        raise ValueError(
            "this policy loss works on tokens chosen over the whole mini-batch: call its `select_tokens` first, and give each "
            "micro-batch its part of the result as `token_mask_T`"
        )
    return batch.token_mask_T
