"""GSPO: PPO's clipped loss with one ratio for a whole response.

With x = log π(token) - log π_old(token), sg[·] taken without gradient, and the mean over a response's tokens,

    s = exp(mean x)                                       Zheng et al. 2025, arXiv:2507.18071
    s_t = sg[s] · π(token) / sg[π(token)]                 section 4.3, "GSPO-token"
    L = max(-A s_t, -A clip(s_t, 1 - low, 1 + high))      for each token

s_t has the value of s and distributes the gradient of s over the tokens, so advantages may differ within a response (as
with GAE); if they do not, value and gradient are those of the paper's main objective. The mean over tokens and then
over responses (`seq-mean-token-mean`) is part of the algorithm. s is close to 1, because log s is a mean of log-ratios:
the paper clips at low 3e-4 and high 4e-4, and PPO's 0.2 clips almost nothing.

The log-ratio of each token is clamped to ±20, and log s to at most 10, beyond which there is no gradient (verl has only
the second of these). There is no dual clip. A response of one token gets PPO's loss.
"""

import torch
from torch import Tensor

from iiverl_core.algorithms.policy_losses.base import (
    PolicyBatch,
    PolicyLossSettings,
    clip_metrics,
    surrogates,
)

MAX_LOG_S = 10.0


def gspo(batch: PolicyBatch, settings: PolicyLossSettings) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the loss of each token; metrics are the tokens of clipped responses and the KL from the old policy."""
    log_probs_T, segments = batch.log_probs_T, batch.segments
    log_ratio_T = batch.log_ratio_T.detach()
    log_s_T = segments.expand(segments.mean(log_ratio_T)) + (log_probs_T - log_probs_T.detach())
    unclipped_T, clipped_T = surrogates(log_s_T.clamp(max=MAX_LOG_S).exp(), batch.advantages_T, settings)
    return torch.maximum(unclipped_T, clipped_T), clip_metrics(log_ratio_T, clipped_T > unclipped_T)
