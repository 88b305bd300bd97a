"""Generation: the `RolloutEngine` protocol, its engines, `Rollouter`s and sampling. Imports no Ray."""

from iiverl_core.rollout.engine import Completion, GenerationRequest, RolloutEngine, SamplingParams, generate
from iiverl_core.rollout.from_config import Sampling, make_engine, sampling_params
from iiverl_core.rollout.rollouter import Rollouter, RolloutRequest, RolloutTokens, SingleTurn, run_rollouts

__all__ = [
    "Completion",
    "GenerationRequest",
    "RolloutEngine",
    "RolloutRequest",
    "RolloutTokens",
    "Rollouter",
    "Sampling",
    "SamplingParams",
    "SingleTurn",
    "generate",
    "make_engine",
    "run_rollouts",
    "sampling_params",
]
