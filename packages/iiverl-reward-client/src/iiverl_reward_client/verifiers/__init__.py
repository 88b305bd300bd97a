"""Verifiers of responses: functions, built in or the user's, in processes that can be killed; programs in a sandbox; a
language model as a judge. A score is finite, and a failure is typed."""

from iiverl_reward_client.verifiers.verifier import (
    BadAnswerError,
    ReferenceFirst,
    ResponseError,
    Submission,
    UnavailableError,
    Verifier,
    VerifierError,
)

__all__ = [
    "BadAnswerError",
    "ReferenceFirst",
    "ResponseError",
    "Submission",
    "UnavailableError",
    "Verifier",
    "VerifierError",
]
