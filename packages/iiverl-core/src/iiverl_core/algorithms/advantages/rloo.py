"""RLOO: a response is compared with the mean of the *other* responses to the same prompt.

With R_i the sum of the rewards of response i, over the n responses to the same prompt,

    A_i = R_i - mean_{j≠i} R_j = n / (n - 1) · (R_i - mean_j R_j),

the same for each of its tokens (Ahmadian et al. 2024, arXiv:2402.14740). A baseline that excludes the
response itself leaves the gradient unbiased. Advantages are in the reward's unit. The paper puts the KL into the
reward; here that is `use_kl_in_reward`.

- Only the sum of a response's rewards matters, not their position.
- A group of one has no others to be compared with: its advantage is 0. In verl it is the reward itself.
- A group whose responses all have the same reward has advantage 0, exactly.
- A response of one token is not a special case. An empty batch gives empty advantages.
"""

from torch import Tensor

from iiverl_core.algorithms.advantages.base import AdvantageBatch, AdvantageSettings
from iiverl_core.algorithms.advantages.groups import Groups


def rloo(batch: AdvantageBatch, settings: AdvantageSettings) -> tuple[Tensor, Tensor]:
    """Compute advantages and returns of each token, (T,) each; without a critic, the two are equal."""
    reward_B = batch.segments.sum(batch.rewards_T)
    groups = Groups(batch.group_B)
    others_B = (groups.count_B - 1).clamp(min=1)
    advantages_T = batch.segments.expand(groups.centred(reward_B) * groups.count_B / others_B)
    return advantages_T, advantages_T
