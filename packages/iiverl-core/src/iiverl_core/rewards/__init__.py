"""What scores a response: built-in rules and users' functions behind one protocol, `Scorer`, which works while others
are still being generated. An outcome is a score or a typed failure, never a made-up zero."""

from iiverl_core.rewards.build import check_prompts, make_scorer
from iiverl_core.rewards.failures import TooManyFailures, check_failures, settle
from iiverl_core.rewards.functions import FunctionScorer
from iiverl_core.rewards.scorer import Key, Scorer

__all__ = [
    "FunctionScorer",
    "Key",
    "Scorer",
    "TooManyFailures",
    "check_failures",
    "check_prompts",
    "make_scorer",
    "settle",
]
