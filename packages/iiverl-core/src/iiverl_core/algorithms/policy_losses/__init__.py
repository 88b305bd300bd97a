"""Policy losses, one per file, listed in `iiverl_core.registry.algorithms`."""

from iiverl_core.algorithms.policy_losses.base import (
    LossFunction,
    PolicyBatch,
    PolicyLoss,
    PolicyLossSettings,
)

__all__ = ["LossFunction", "PolicyBatch", "PolicyLoss", "PolicyLossSettings"]
