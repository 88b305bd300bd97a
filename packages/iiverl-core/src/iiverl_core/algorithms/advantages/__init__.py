"""Advantage estimators by their `algorithm.adv_estimator` name, one a file."""

from iiverl_core.algorithms.advantages.base import AdvantageBatch, AdvantageEstimator, AdvantageSettings
from iiverl_core.algorithms.advantages.grpo import grpo

ADVANTAGES: dict[str, AdvantageEstimator] = {"grpo": grpo}

__all__ = ["ADVANTAGES", "AdvantageBatch", "AdvantageEstimator", "AdvantageSettings"]
