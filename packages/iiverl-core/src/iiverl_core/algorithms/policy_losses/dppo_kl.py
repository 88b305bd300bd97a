"""DPPO with the KL divergence: a trust region on the binary KL between old and new policy at each token.

The loss is that of `dppo`, with p = π(token), p_old = π_old(token) and

    D = p_old log(p_old / p) + (1 - p_old) log((1 - p_old) / (1 - p))      Qi et al. 2026, arXiv:2602.04879, binary KL

in nats. 1e-8 is added to both 1 - p_old and 1 - p in the last fraction, as in verl, for tokens of probability 1. The
authors' recipe has bounds of 0.05; the default of 0.2 is PPO's. Tokens are independent: a response of one token is not
a special case.
"""

from torch import Tensor

from iiverl_core.algorithms.policy_losses.base import PolicyBatch, PolicyLossSettings
from iiverl_core.algorithms.policy_losses.dppo import trust_region_loss

EPSILON = 1e-8


def dppo_kl(batch: PolicyBatch, settings: PolicyLossSettings) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the loss of each token; metrics are masked and truncated tokens, and the KL from the old policy."""
    new_T, old_T = batch.log_probs_T.detach(), batch.old_log_probs_T
    rest_T, old_rest_T = -new_T.expm1(), -old_T.expm1()
    # rounding can make a log-prob positive, and its complement negative
    log_rest_T = ((old_rest_T.clamp(min=0) + EPSILON) / (rest_T.clamp(min=0) + EPSILON)).log()
    divergence_T = old_T.exp() * (old_T - new_T) + old_rest_T * log_rest_T
    return trust_region_loss(batch, settings, divergence_T)
