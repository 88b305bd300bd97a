"""Pass@k: only the best response to a prompt has an advantage, its margin over the second best.

With R_i the sum of the rewards of response i, over the n responses to the same prompt,

    A_i = max_j R_j - max_{j≠i} R_j,        divided by (std_j R_j + 1e-6) with `norm_by_std`,

the same for each of its tokens: how much the group's best reward would drop without response i. This is the
leave-one-out advantage of the objective "the best of k" with k = n (Tang et al. 2025, arXiv:2503.19595), and 0 for all
but the best response. Dividing by the unbiased standard deviation follows GRPO, not the paper. Advantages are never
negative: no response is made less likely directly.

- Only the sum of a response's rewards matters, not their position.
- A group of one has nothing to be compared with: its advantage is 0. In verl it is an error.
- If two responses share a group's best reward, the whole group has advantage 0, as does a group without variance. With
  rewards of 0 and 1, that is every group in which not exactly one response is correct.
- A response of one token is not a special case. An empty batch gives empty advantages.
"""

import torch
from torch import Tensor

from iiverl_core.algorithms.advantages.base import AdvantageBatch, AdvantageSettings
from iiverl_core.algorithms.advantages.groups import EPSILON, Groups


def grpo_passk(batch: AdvantageBatch, settings: AdvantageSettings) -> tuple[Tensor, Tensor]:
    """Compute advantages and returns of each token, (T,) each; without a critic, the two are equal."""
    reward_B = batch.segments.sum(batch.rewards_T)
    groups = Groups(batch.group_B)

    # Sort by group, then by reward: the last two of each group are its second best and its best.
    order_B = reward_B.argsort()
    order_B = order_B[batch.group_B[order_B].argsort(stable=True)]
    sorted_B = batch.group_B[order_B]
    last_B = torch.ones_like(sorted_B, dtype=torch.bool)
    last_B[:-1] = sorted_B[1:] != sorted_B[:-1]
    last_B &= groups.count_B[order_B] > 1
    best, second = order_B[last_B], order_B[last_B.roll(-1)]

    advantage_B = torch.zeros_like(reward_B)
    advantage_B[best] = reward_B[best] - reward_B[second]
    if settings.norm_by_std:
        advantage_B = advantage_B / (groups.std(reward_B) + EPSILON)
    advantages_T = batch.segments.expand(advantage_B)
    return advantages_T, advantages_T
