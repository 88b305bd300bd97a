"""ReMax: a response is compared with the policy's greedy response to the same prompt.

With r_t the reward of token t, and b the score of the greedy response to the same prompt,

    G_t = Σ_{k≥t} r_k,        A_t = G_t - b

(Li et al. 2023, arXiv:2310.10505, algorithm 1, which has a single reward at the end of the response). The baseline
costs one additional greedy response per prompt; a single sampled response per prompt is enough. Returns and advantages
are in the reward's unit. As in verl, the baseline is the score without a KL penalty, and nothing is discounted: `gamma`
is not used.

- Rewards count at their own token: a token is credited with its own and later rewards.
- The baseline does not come from the group: a group of one and a group without variance are not special cases. A
  response with the same score as the greedy one has advantage 0, unless KL is part of the reward.
- A response of one token has its reward as return. An empty batch gives empty advantages.
"""

from torch import Tensor

from iiverl_core.algorithms.advantages.base import AdvantageBatch, AdvantageSettings


def remax(batch: AdvantageBatch, settings: AdvantageSettings) -> tuple[Tensor, Tensor]:
    """Compute advantages and returns of each token, (T,) each.

    Raises:
        ValueError: the batch has no scores of greedy responses.
    """
    if batch.baseline_B is None:
        raise ValueError(
            "the remax estimator needs the score of a greedy response to each prompt (baseline_B)"
        )
    returns_T = batch.segments.discounted_sum(batch.rewards_T, 1.0)
    return returns_T - batch.segments.expand(batch.baseline_B), returns_T
