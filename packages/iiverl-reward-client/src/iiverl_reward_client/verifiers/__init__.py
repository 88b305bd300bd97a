"""What scores a response: functions for mathematics, edits and users' own kinds, which run in processes that can be
killed; programs in a sandbox; a language model as a judge. A score is finite, and a failure says of what kind it is."""

from iiverl_reward_client.verifiers.verifier import (
    BadAnswerError,
    Submission,
    UnavailableError,
    Verifier,
    VerifierError,
)

__all__ = ["BadAnswerError", "Submission", "UnavailableError", "Verifier", "VerifierError"]
