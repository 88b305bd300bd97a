"""Outcomes that rollouts bring: the rewards of environments, and the failures of what answers the model."""

import math
from collections.abc import Iterable, Mapping

from iiverl_core.samples import Rollout, SampleId
from iiverl_reward_client import Failed, Outcome, Scored

ENVIRONMENT = "environment"
"""The component of a score that holds the environment's reward, if another source's is added."""


def outcome_of_environment(rollout: Rollout) -> Outcome:
    """Return the outcome that a rollout brings; it is the `ScoreFunction` of the reward source `environment`."""
    return rollout.outcome or Failed("environment", detail="the rollout brings no reward")


def with_environment(
    rollouts: Iterable[Rollout], outcomes: Mapping[SampleId, Outcome], *, add: bool
) -> dict[SampleId, Outcome]:
    """Complete a scorer's outcomes by the failures that rollouts bring, and with `add` by their environments' rewards.

    The two scores become components of the sum, the scorer's as `score`.
    """
    completed: dict[SampleId, Outcome] = {}
    for rollout in rollouts:
        brought = rollout.outcome
        outcome = brought if isinstance(brought, Failed) else outcomes[rollout.id]
        if add and isinstance(brought, Scored) and isinstance(outcome, Scored):
            outcome = _sum(outcome, brought)
        completed[rollout.id] = outcome
    return completed


def _sum(scored: Scored, brought: Scored) -> Outcome:
    score = scored.score + brought.score
    if not math.isfinite(score):
        return Failed("environment", detail=f"with the environment's reward the score is {score}")
    components = {ENVIRONMENT: brought.score, "score": scored.score}
    return Scored(
        score, {**brought.components, **scored.components, **components}, {**brought.info, **scored.info}
    )
