"""GAE: the exponentially weighted average of n-step advantage estimates from a critic.

With r_t the reward of token t, V_t the critic's estimate of the rewards from token t on, and V = 0 after the last,

    δ_t = r_t + γ V_{t+1} - V_t,        Â_t = Σ_{k≥t} (γλ)^{k-t} δ_k,        returns_t = Â_t + V_t

(Schulman et al. 2015, arXiv:1506.02438, eq. 16). The advantages are Â whitened over all tokens of the step, mean 0 and
variance 1, which is common in PPO but not part of the paper; the returns, which the critic learns, are not whitened.
λ = 1 uses the observed rewards, λ = 0 the critic's estimate after one token. Returns are in the reward's unit;
advantages have none. A response truncated at the length limit is treated as terminated, as in verl.

The sum is computed by doubling in O(T log longest response) instead of backwards token by token: see
`Segments.discounted_sum`.

- Rewards count at their own token: a token is credited with its own and later rewards.
- Groups are ignored: a group of one and a group without variance are not special cases.
- A response of one token has Â = r - V and its reward as return. An empty batch gives empty advantages.
- A step whose Â are all equal, and a step of a single token, have advantage 0, exactly. In verl the latter is an error.
"""

from torch import Tensor

from iiverl_core.algorithms.advantages.base import AdvantageBatch, AdvantageSettings
from iiverl_core.algorithms.advantages.whitening import whiten


def gae(batch: AdvantageBatch, settings: AdvantageSettings) -> tuple[Tensor, Tensor]:
    """Compute whitened advantages, and returns for the critic, of each token, (T,) each.

    Raises:
        ValueError: the batch has no values.
    """
    if batch.values_T is None:
        raise ValueError(
            "the gae estimator needs a critic's values: leave `critic.enable` out or set it to true, or choose an "
            "`algorithm.adv_estimator` without a critic, such as grpo"
        )
    next_T = batch.values_T.roll(-1).index_fill(0, batch.segments.last_B, 0.0)
    delta_T = batch.rewards_T + settings.gamma * next_T - batch.values_T
    raw_T = batch.segments.discounted_sum(delta_T, settings.gamma * settings.lam)
    return whiten(raw_T), raw_T + batch.values_T
