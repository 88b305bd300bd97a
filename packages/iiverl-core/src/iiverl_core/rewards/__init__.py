"""Score responses with built-in rules, user functions, reward servers and reward models, behind one protocol.

A `Scorer` works while other responses are still being generated. An outcome is a score or a typed failure, never a
made-up zero."""

from iiverl_core.rewards.build import (
    add_reward_model,
    check_ground_truths,
    check_prompts,
    check_reward_model,
    make_scorer,
)
from iiverl_core.rewards.environment import with_environment
from iiverl_core.rewards.failures import TooManyFailures, apply_failure_policy, check_failures
from iiverl_core.rewards.functions import FunctionScorer
from iiverl_core.rewards.model import ModelScorer, RewardModelInput, ScoreSequences
from iiverl_core.rewards.overlong import OVERLONG_PENALTY, shape_overlong
from iiverl_core.rewards.scorer import Scorer

__all__ = [
    "OVERLONG_PENALTY",
    "FunctionScorer",
    "ModelScorer",
    "RewardModelInput",
    "ScoreSequences",
    "Scorer",
    "TooManyFailures",
    "add_reward_model",
    "apply_failure_policy",
    "check_failures",
    "check_ground_truths",
    "check_prompts",
    "check_reward_model",
    "make_scorer",
    "shape_overlong",
    "with_environment",
]
