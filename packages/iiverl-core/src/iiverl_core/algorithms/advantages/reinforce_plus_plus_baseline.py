"""REINFORCE++-baseline: the difference from the group's mean, whitened over the whole step.

With R_i the sum of the rewards of response i, over the responses j to the same prompt,

    D_i = R_i - mean_j R_j,        A_i = (D_i - mean D) / √(var D + 1e-8),

the same for each of its tokens; mean and unbiased variance of D over all tokens of the step (Hu et al. 2025,
arXiv:2501.03262). Unlike in GRPO, all prompts are divided by the same number, so a prompt of small variance does not
get a large weight. Every token has the same weight in the mean, as in verl. Advantages have no unit.

- Only the sum of a response's rewards matters, not their position; `gamma` is not used.
- A group of one has nothing to be compared with: its advantage is 0, and it is excluded from mean and variance. In verl
  its D is the reward itself.
- A group whose responses all have the same reward has D = 0 and therefore the advantage -mean D / √(var D + 1e-8). That
  is 0 if all responses have the same length; otherwise its sign depends on whether the step's better responses are
  longer or shorter.
- A response of one token is not a special case. An empty batch gives empty advantages. A step whose D are all equal has
  advantage 0, exactly.
"""

import torch
from torch import Tensor

from iiverl_core.algorithms.advantages.base import AdvantageBatch, AdvantageSettings
from iiverl_core.algorithms.advantages.groups import Groups
from iiverl_core.algorithms.advantages.whitening import whiten


def reinforce_plus_plus_baseline(batch: AdvantageBatch, settings: AdvantageSettings) -> tuple[Tensor, Tensor]:
    """Compute advantages and returns of each token, (T,) each; without a critic, the two are equal."""
    groups = Groups(batch.group_B)
    centred_T = batch.segments.expand(groups.centred(batch.segments.sum(batch.rewards_T)))
    compared_T = batch.segments.expand(groups.count_B > 1)
    advantages_T = torch.zeros_like(centred_T)
    advantages_T[compared_T] = whiten(centred_T[compared_T])
    return advantages_T, advantages_T
