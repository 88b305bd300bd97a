"""GRPO: a response is compared with the mean of the responses to the same prompt.

With R_i the sum of the rewards of response i, over the responses j to the same prompt,

    A_i = (R_i - mean_j R_j) / (std_j R_j + 1e-6),

the same for each of its tokens (Shao et al. 2024, DeepSeekMath, arXiv:2402.03300, section 4.1.2, outcome rewards).
`std` is unbiased. Without the division this is the advantage of Dr. GRPO (Liu et al. 2025, arXiv:2503.20783), which
does not give prompts of small variance a large weight. Advantages have no unit with the division, and the reward's unit
without it.

- Only the sum of a response's rewards matters, not their position (a KL penalty is on each token).
- A group of one has nothing to be compared with: its advantage is 0. In verl it is the reward itself.
- A group whose responses all have the same reward has advantage 0, exactly.
- A response of one token is not a special case. An empty batch gives empty advantages.
"""

from torch import Tensor

from iiverl_core.algorithms.advantages.base import AdvantageBatch, AdvantageSettings
from iiverl_core.algorithms.advantages.groups import EPSILON, Groups


def grpo(batch: AdvantageBatch, settings: AdvantageSettings) -> tuple[Tensor, Tensor]:
    """Compute advantages and returns of each token, (T,) each; without a critic, the two are equal."""
    reward_B = batch.segments.sum(batch.rewards_T)
    groups = Groups(batch.group_B)
    advantage_B = groups.centred(reward_B)
    if settings.norm_by_std:
        advantage_B = advantage_B / (groups.std(reward_B) + EPSILON)
    advantages_T = batch.segments.expand(advantage_B)
    return advantages_T, advantages_T
