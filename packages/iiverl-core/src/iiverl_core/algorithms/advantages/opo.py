"""OPO: a response is compared with the length-weighted mean of the responses to the same prompt.

With R_i the sum of the rewards of response i and l_i its number of tokens, over the responses j to the same prompt,

    A_i = R_i - Σ_j l_j R_j / Σ_j l_j,

the same for each of its tokens (Hao et al. 2025, arXiv:2505.23585). This baseline has the least variance if all tokens'
gradients have the same norm and those of different tokens are orthogonal. With token-mean aggregation, the loss uses
the same weights as this mean, so the advantages of a group's tokens average to 0. Advantages are in the reward's unit.
The paper is exactly on-policy, with one update per step; set the batch sizes accordingly.

- Only the sum of a response's rewards matters, not their position.
- A group of one has nothing to be compared with: its advantage is 0. In verl it is the reward itself.
- A group whose responses all have the same reward has advantage 0, exactly.
- A response of one token is not a special case. An empty batch gives empty advantages.
"""

from torch import Tensor

from iiverl_core.algorithms.advantages.base import AdvantageBatch, AdvantageSettings
from iiverl_core.algorithms.advantages.groups import Groups


def opo(batch: AdvantageBatch, settings: AdvantageSettings) -> tuple[Tensor, Tensor]:
    """Compute advantages and returns of each token, (T,) each; without a critic, the two are equal."""
    reward_B = batch.segments.sum(batch.rewards_T)
    length_B = batch.segments.lengths_B.to(reward_B.dtype)
    advantages_T = batch.segments.expand(Groups(batch.group_B).centred(reward_B, length_B))
    return advantages_T, advantages_T
