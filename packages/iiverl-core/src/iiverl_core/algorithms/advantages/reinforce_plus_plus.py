"""REINFORCE++: the discounted return of each token, whitened over the whole step instead of compared within a group.

With r_t the reward of token t of a response of l tokens,

    G_t = Σ_{k≥t} γ^{k-t} r_k,        A_t = (G_t - mean G) / √(var G + 1e-8),

mean and unbiased variance over all tokens of the step (Hu et al. 2025, arXiv:2501.03262). The paper has γ = 1 and the
KL (`k1`) in the reward of each token; here those are `gamma` and `use_kl_in_reward`. Every token has the same weight in
the mean, as in verl, so long responses weigh more than short ones. Returns are G_t, in the reward's unit; advantages
have none. Cost: O(T log longest response), see `Segments.discounted_sum`.

- Rewards count at their own token: a token is credited with its own and later rewards.
- Groups are ignored: a group of one and a group without variance are not special cases.
- A response of one token has its reward as return. An empty batch gives empty advantages.
- A step whose returns are all equal has advantage 0, exactly; so does a step of one response with its reward on the
  last token and γ = 1. In verl a step of a single token is an error.
"""

from torch import Tensor

from iiverl_core.algorithms.advantages.base import AdvantageBatch, AdvantageSettings
from iiverl_core.algorithms.advantages.whitening import whiten


def reinforce_plus_plus(batch: AdvantageBatch, settings: AdvantageSettings) -> tuple[Tensor, Tensor]:
    """Compute whitened advantages and returns of each token, (T,) each."""
    returns_T = batch.segments.discounted_sum(batch.rewards_T, settings.gamma)
    return whiten(returns_T), returns_T
