"""What scores a response: built-in rules, users' functions, reward servers and reward models behind one protocol,
`Scorer`, which works while others are still being generated. An outcome is a score or a typed failure, never a made-up
zero."""

from iiverl_core.rewards.build import (
    add_reward_model,
    check_ground_truths,
    check_prompts,
    check_reward_model,
    make_scorer,
)
from iiverl_core.rewards.failures import TooManyFailures, check_failures, settle
from iiverl_core.rewards.functions import FunctionScorer
from iiverl_core.rewards.model import ModelScorer, ScoreSamples
from iiverl_core.rewards.overlong import OVERLONG_PENALTY, shape_overlong
from iiverl_core.rewards.scorer import Key, Scorer

__all__ = [
    "OVERLONG_PENALTY",
    "FunctionScorer",
    "Key",
    "ModelScorer",
    "ScoreSamples",
    "Scorer",
    "TooManyFailures",
    "add_reward_model",
    "check_failures",
    "check_ground_truths",
    "check_prompts",
    "check_reward_model",
    "make_scorer",
    "settle",
    "shape_overlong",
]
