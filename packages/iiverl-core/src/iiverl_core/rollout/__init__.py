"""Generation: the `RolloutEngine` protocol, its engines, `Rollouter`s and sampling. Imports no Ray."""

from iiverl_core.rollout.engine import Completion, GenerationRequest, RolloutEngine, SamplingParams, generate
from iiverl_core.rollout.from_config import Sampling, make_engine, make_rollouter, sampling_params
from iiverl_core.rollout.rollouter import (
    Generate,
    Rollouter,
    RolloutRequest,
    RolloutTokens,
    SingleTurn,
)
from iiverl_core.rollout.runner import RolloutRunner, run_rollouts

__all__ = [
    "Completion",
    "Generate",
    "GenerationRequest",
    "RolloutEngine",
    "RolloutRequest",
    "RolloutRunner",
    "RolloutTokens",
    "Rollouter",
    "Sampling",
    "SamplingParams",
    "SingleTurn",
    "generate",
    "make_engine",
    "make_rollouter",
    "run_rollouts",
    "sampling_params",
]
