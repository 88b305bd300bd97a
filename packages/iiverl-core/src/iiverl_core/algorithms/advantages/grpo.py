"""GRPO: a response is as good as it is better than the other responses to the same prompt.

With R_i the sum of the rewards of response i, over the responses j to the same prompt,

    A_i = (R_i - mean_j R_j) / (std_j R_j + 1e-6),

the same for each of its tokens (Shao et al. 2024, DeepSeekMath, arXiv:2402.03300, eq. 3 with outcome rewards). `std`
is the unbiased one. Without the division it is Dr. GRPO's advantage (Liu et al. 2025, arXiv:2503.20783), which does
not give prompts of small variance a large weight.

- A group of one has nothing to be compared with: its advantage is 0.
- A group whose responses all have the same reward has advantage 0.
"""

import torch
from torch import Tensor

from iiverl_core.algorithms.advantages.base import AdvantageBatch, AdvantageSettings

EPSILON = 1e-6  # keeps a group of almost equal rewards finite


def grpo(batch: AdvantageBatch, settings: AdvantageSettings) -> tuple[Tensor, Tensor]:
    """Advantages and returns of each token, (T,) each; the two are the same, as there is no critic."""
    reward_B = batch.segments.sum(batch.rewards_T)
    group_B = batch.group_B
    groups = int(group_B.max()) + 1 if group_B.numel() else 0

    count_G = torch.bincount(group_B, minlength=groups).to(reward_B.dtype)
    mean_G = reward_B.new_zeros(groups).index_add(0, group_B, reward_B) / count_G
    centred_B = torch.where(count_G[group_B] > 1, reward_B - mean_G[group_B], 0.0)
    if settings.norm_by_std:
        square_G = reward_B.new_zeros(groups).index_add(0, group_B, centred_B.square())
        std_G = (square_G / (count_G - 1).clamp(min=1)).sqrt()
        centred_B = centred_B / (std_G[group_B] + EPSILON)

    advantages_T = batch.segments.expand(centred_B)
    return advantages_T, advantages_T
