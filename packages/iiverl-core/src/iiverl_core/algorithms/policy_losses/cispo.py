"""CISPO: REINFORCE weighted with a clipped ratio, so that no token loses its gradient.

With r = π(token) / π_old(token), A its advantage, and sg[·] taken without gradient,

    L = -sg[clip(r, 1 - low, 1 + high)] A log π(token)        MiniMax 2025, arXiv:2506.13585

for each token, in the paper averaged over all tokens of the batch (`token-mean`). In PPO a token whose ratio is out of
bounds loses its gradient; here it keeps a gradient of bounded weight. The paper sets no lower bound, only `high`: a
`low` of 1 or more reproduces that, while the default of 0.2, as in verl, also bounds the weight from below.

Only the gradient of this loss is that of the objective; its value is not meaningful. The log-ratio is clamped to ±20.
Tokens are independent: a response of one token is not a special case.
"""

from torch import Tensor

from iiverl_core.algorithms.policy_losses.base import PolicyBatch, PolicyLossSettings, clip_metrics


def cispo(batch: PolicyBatch, settings: PolicyLossSettings) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the loss of each token; metrics are the tokens of clipped weight and the KL from the old policy."""
    log_ratio_T = batch.log_ratio_T.detach()
    ratio_T = log_ratio_T.exp()
    weight_T = ratio_T.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    losses_T = -weight_T * batch.advantages_T * batch.log_probs_T
    return losses_T, clip_metrics(log_ratio_T, weight_T != ratio_T)
