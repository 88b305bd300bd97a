"""Advantage estimators, one per file; their table is `iiverl_core.registry.algorithms`."""

from iiverl_core.algorithms.advantages.base import (
    AdvantageBatch,
    AdvantageSettings,
    Estimator,
    EstimatorFunction,
)

__all__ = ["AdvantageBatch", "AdvantageSettings", "Estimator", "EstimatorFunction"]
