"""SAPO: a smooth gate on the ratio instead of PPO's clipping.

With r = π(token) / π_old(token), A its advantage, σ the logistic function, and τ = `tau_pos` where A > 0, else
`tau_neg`,

    L = -A σ(τ (r - 1)) · 4/τ                             Gao et al. 2025, arXiv:2511.20347

for each token. The gradient is that of -A r times a weight 4 σ (1 - σ), which is 1 at r = 1 and decreases on both
sides, faster for a larger τ; tokens of negative advantage are constrained more by default (1.05 instead of 1), as in
the paper. The mean over tokens and then over responses (`seq-mean-token-mean`) is part of the algorithm.

Nothing is clipped: both clip fractions are reported as 0. The log-ratio is clamped to ±20. Tokens are independent: a
response of one token is not a special case.
"""

import torch
from torch import Tensor

from iiverl_core.algorithms.policy_losses.base import PolicyBatch, PolicyLossSettings, clip_metrics


def sapo(batch: PolicyBatch, settings: PolicyLossSettings) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the loss of each token; the metric is the KL from the old policy."""
    log_ratio_T, advantages_T = batch.log_ratio_T, batch.advantages_T
    tau_T = torch.full_like(log_ratio_T, settings.tau_neg).masked_fill(advantages_T > 0, settings.tau_pos)
    gate_T = (tau_T * (log_ratio_T.exp() - 1)).sigmoid() * 4 / tau_T
    return -advantages_T * gate_T, clip_metrics(log_ratio_T, torch.zeros_like(log_ratio_T))
