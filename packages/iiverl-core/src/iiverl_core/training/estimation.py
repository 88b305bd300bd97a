"""Advantages and returns from the scores of a whole step."""

from dataclasses import dataclass

import torch
from torch import Tensor

from iiverl_core.algorithms import AdvantageBatch, AdvantageSettings, Estimator, Segments, kl_divergence
from iiverl_core.config import AlgorithmConfig


@dataclass(frozen=True)
class ScoredStep:
    """The scored rollouts of a step, with the values of their trained tokens.

    `segments` counts the trained tokens of each rollout; those of all its sequences are concatenated. `scores_B`
    (float64 if there are `turn_rewards_T`), `group_B` (int64) and, if the estimator needs it, `baseline_B` have one entry per rollout. `old_T`, `ref_T`
    (log-probs, nats), if KL goes into the reward, `values_T`, with a critic, and `turn_rewards_T`, which are a part of the
    scores, have one entry per trained token.
    """

    segments: Segments
    scores_B: Tensor
    group_B: Tensor
    baseline_B: Tensor | None = None
    old_T: Tensor | None = None
    ref_T: Tensor | None = None
    values_T: Tensor | None = None
    turn_rewards_T: Tensor | None = None


@dataclass(frozen=True)
class Estimated:
    """Advantages and returns, (T,); rewards after the KL penalty, (B,); and the KL of each token before its weight, (T,)."""

    advantages_T: Tensor
    returns_T: Tensor
    rewards_B: Tensor
    kl_T: Tensor


def estimate(step: ScoredStep, estimator: Estimator, algorithm: AlgorithmConfig, kl_coef: float) -> Estimated:
    """Put the score on the last token, subtract the KL penalty from every token, and estimate advantages.

    Rewards of turns stay where they are, and the last token gets the rest of the score.

    Raises:
        ValueError: the estimator needs values that the step does not have, or its results have the wrong shape.
    """
    rewards_T = _rewards(step)
    kl_T = torch.zeros_like(rewards_T)
    if kl_coef and step.old_T is not None and step.ref_T is not None:
        kl_T = kl_divergence(algorithm.kl_penalty, step.old_T, step.ref_T)
        rewards_T = rewards_T - kl_coef * kl_T
    advantages_T, returns_T = estimator(
        AdvantageBatch(rewards_T, step.segments, step.group_B, step.values_T, step.baseline_B),
        AdvantageSettings(algorithm.gamma, algorithm.lam, algorithm.norm_adv_by_std_in_grpo),
    )
    for name, x_T in (("advantages", advantages_T), ("returns", returns_T)):
        if x_T.shape != rewards_T.shape:
            raise ValueError(
                f"algorithm.adv_estimator: {algorithm.adv_estimator} gave {name} of shape {tuple(x_T.shape)} for "
                f"{rewards_T.numel()} tokens"
            )
    return Estimated(advantages_T, returns_T, step.segments.sum(rewards_T), kl_T)


def _rewards(step: ScoredStep) -> Tensor:
    """Return the rewards of turns where they are, with the rest of the score on the last token, (T,)."""
    if step.turn_rewards_T is None:
        return step.segments.at_last(step.scores_B)
    in_turns_B = step.segments.sum(step.turn_rewards_T.double())
    rest_B = step.scores_B.double() - in_turns_B  # in double precision, so that it is 0 if it is nothing
    return step.segments.at_last(rest_B.to(step.turn_rewards_T.dtype)) + step.turn_rewards_T


def explained_variance(values_T: Tensor, returns_T: Tensor) -> float | None:
    """Compute the fraction of the returns' variance that the critic explains: 1 - var(returns - values) / var(returns).

    1 is perfect, 0 as good as predicting the mean, negative worse than that. None if the returns do not vary.
    """
    if returns_T.numel() < 2 or returns_T.var() == 0:
        return None
    return (1 - (returns_T - values_T).var() / returns_T.var()).item()
