"""Pure tensor functions: advantages, policy losses, KL. One algorithm per file; the registries find them by name.

torch is the only third-party import. All tensors are flat, without padding: see `segments`.
"""

from iiverl_core.algorithms.advantages import AdvantageBatch, AdvantageSettings, Estimator
from iiverl_core.algorithms.kl import kl_divergence
from iiverl_core.algorithms.policy_losses import PolicyBatch, PolicyLoss, PolicyLossSettings
from iiverl_core.algorithms.segments import Segments
from iiverl_core.algorithms.user_functions import find_estimator, find_policy_loss

__all__ = [
    "AdvantageBatch",
    "AdvantageSettings",
    "Estimator",
    "PolicyBatch",
    "PolicyLoss",
    "PolicyLossSettings",
    "Segments",
    "find_estimator",
    "find_policy_loss",
    "kl_divergence",
]
