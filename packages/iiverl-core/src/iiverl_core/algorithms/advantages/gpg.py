"""GPG: the difference from the group's mean, rescaled to make up for groups without a gradient.

With R_i the sum of the rewards of response i, over the responses j to the same prompt,

    A_i = α (R_i - mean_j R_j),        α = B / (B - M),

the same for each of its tokens (Chu et al. 2025, arXiv:2504.02546, eq. 7, with F_norm = 1). B is the number of
responses in the step, M the number of those in groups whose rewards are all equal. The latter have no gradient but
still count in the mean over which the loss is taken; α compensates, so that a step's gradient does not shrink as more
prompts are always or never solved. Advantages are in the reward's unit. Use it with the policy loss of the same name.
α is computed over the whole step, not per mini-batch.

verl replaces B - M with the number of responses whose reward is not 0, which is a different quantity: with rewards of 0
and 1 it multiplies advantages by one over the fraction of correct responses, even if every group is mixed, and it
changes when a constant is added to all rewards. This implementation follows the paper.

- Only the sum of a response's rewards matters, not their position.
- A group of one has nothing to be compared with: its advantage is 0, and it counts in neither B nor M.
- A group whose responses all have the same reward has advantage 0, exactly. If all groups are like this, α does not
  matter. With KL in the reward, rewards are hardly ever equal, and α is 1.
- A response of one token is not a special case. An empty batch gives empty advantages.
"""

from torch import Tensor

from iiverl_core.algorithms.advantages.base import AdvantageBatch, AdvantageSettings
from iiverl_core.algorithms.advantages.groups import Groups


def gpg(batch: AdvantageBatch, settings: AdvantageSettings) -> tuple[Tensor, Tensor]:
    """Compute advantages and returns of each token, (T,) each; without a critic, the two are equal."""
    reward_B = batch.segments.sum(batch.rewards_T)
    groups = Groups(batch.group_B)
    centred_B = groups.centred(reward_B)
    compared = (groups.count_B > 1).sum()
    mixed = (groups.sum(centred_B.abs()) > 0).sum()
    alpha = compared.to(reward_B.dtype) / mixed.clamp(min=1)
    advantages_T = batch.segments.expand(alpha * centred_B)
    return advantages_T, advantages_T
