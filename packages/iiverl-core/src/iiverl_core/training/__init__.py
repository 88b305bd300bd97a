"""Training a model on sampled sequences: the backend's protocol, batching, log-probs and losses. Independent of Ray."""

from iiverl_core.config.roles import Role
from iiverl_core.training.backend import (
    AdapterWeights,
    LayoutKind,
    Loss,
    MicroBatch,
    ModelSpec,
    Outputs,
    ParallelRank,
    StepResult,
    TrainingBackend,
)

__all__ = [
    "AdapterWeights",
    "LayoutKind",
    "Loss",
    "MicroBatch",
    "ModelSpec",
    "Outputs",
    "ParallelRank",
    "Role",
    "StepResult",
    "TrainingBackend",
]
