"""Scores from outside: a score or a typed failure, never a made-up zero. Needs httpx and nothing else of iiverl."""

from iiverl_reward_client.outcomes import Failed, FailureKind, Outcome, Scored
from iiverl_reward_client.protocol import outcome_of, request_payload

__all__ = ["Failed", "FailureKind", "Outcome", "Scored", "outcome_of", "request_payload"]
