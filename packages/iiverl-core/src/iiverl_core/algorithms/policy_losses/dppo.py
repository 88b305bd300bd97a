"""The loss of both DPPO variants: a token is masked once the policy has moved too far on it, by some divergence.

With p = π(token), p_old = π_old(token), r = p / p_old, A its advantage, D a divergence of the two, and sg[·] taken
without gradient,

    L = -sg[min(r, dual)] A log p
    L = 0   where D > high, p > p_old and A > 0; or D > low, p < p_old and A ≤ 0

for each token: Qi et al. 2026, arXiv:2602.04879. PPO bounds r itself, which restricts rare tokens too much (from 1e-5
to 1e-3 is a ratio of 100 but hardly changes the distribution) and frequent ones too little (0.99 to 0.8 is within the
bounds); D bounds the change of the distribution. As in PPO, only updates that move further away are masked.

D would be a sum over the vocabulary; here it is its "binary" lower bound, between the events "this token" and "any
other". `dual` (the same setting as PPO's dual clip, as in verl) truncates the ratio; the authors' recipe effectively
disables this with a very large value, and takes the ratio to the rollout engine's policy; here it is to
`old_log_probs_T`, the trainer's.
"""

from torch import Tensor

from iiverl_core.algorithms.policy_losses.base import PolicyBatch, PolicyLossSettings, clip_metrics


def trust_region_loss(
    batch: PolicyBatch, settings: PolicyLossSettings, divergence_T: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the loss of each token; metrics are masked and truncated tokens, and the KL from the old policy."""
    log_probs_T, advantages_T = batch.log_probs_T, batch.advantages_T
    log_ratio_T = batch.log_ratio_T.detach()
    ratio_T = log_ratio_T.exp()
    positive_T = advantages_T > 0
    too_high_T = (divergence_T > settings.clip_high) & (log_ratio_T > 0) & positive_T
    too_low_T = (divergence_T > settings.clip_low) & (log_ratio_T < 0) & ~positive_T
    masked_T = too_high_T | too_low_T
    losses_T = -ratio_T.clamp(max=settings.clip_dual) * advantages_T * log_probs_T
    truncated_T = (ratio_T > settings.clip_dual) & ~masked_T
    return losses_T.masked_fill(masked_T, 0), clip_metrics(log_ratio_T, masked_T, truncated_T)
