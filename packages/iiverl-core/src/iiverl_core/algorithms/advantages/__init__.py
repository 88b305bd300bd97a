"""Advantage estimators, one per file, listed in `iiverl_core.registry.algorithms`."""

from iiverl_core.algorithms.advantages.base import (
    AdvantageBatch,
    AdvantageSettings,
    Estimator,
    EstimatorFunction,
)

__all__ = ["AdvantageBatch", "AdvantageSettings", "Estimator", "EstimatorFunction"]
