"""DPPO with the total variation: a trust region on the change of each token's probability.

The loss is that of `dppo`, with

    D = |π(token) - π_old(token)|                         Qi et al. 2026, arXiv:2602.04879, binary TV

Bounds are probabilities, between 0 and 1. The authors' recipe has 0.15; the default of 0.2 is PPO's. Tokens are
independent: a response of one token is not a special case.
"""

from torch import Tensor

from iiverl_core.algorithms.policy_losses.base import PolicyBatch, PolicyLossSettings
from iiverl_core.algorithms.policy_losses.dppo import trust_region_loss


def dppo_tv(batch: PolicyBatch, settings: PolicyLossSettings) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the loss of each token; metrics are masked and truncated tokens, and the KL from the old policy."""
    divergence_T = (batch.log_probs_T.detach().exp() - batch.old_log_probs_T.exp()).abs()
    return trust_region_loss(batch, settings, divergence_T)
