"""GPG: the plain policy gradient, without a ratio and without clipping.

    L = -A log π(token)                                   Chu et al. 2025, arXiv:2504.02546

for each token, with A its advantage; the specifics of the method are in the advantage (`adv_estimator: gpg`). The
gradient assumes samples of the current policy: it is correct for the first update of a step and less accurate with each
further update, so `ppo_kl` is reported, which verl does not do. Only the gradient of this loss is that of the
objective; its value is not meaningful. Tokens are independent: a response of one token is not a special case.
"""

from torch import Tensor

from iiverl_core.algorithms.policy_losses.base import PolicyBatch, PolicyLossSettings


def gpg(batch: PolicyBatch, settings: PolicyLossSettings) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the loss of each token; the metric is the KL from the old policy."""
    return -batch.advantages_T * batch.log_probs_T, {"ppo_kl": -batch.log_ratio_T.detach()}
