"""The interface between the server and verifiers, and the principle that decides between a score and a failure.

What the response causes is a score of 0 (`ResponseError`); what the reference, the machine or a service causes is a
failure (`VerifierError`). The reference is read before the response is looked at.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from iiverl_reward_client.outcomes import FailureKind, Scored


@dataclass(frozen=True, slots=True)
class Submission:
    """A response to be verified, and its reference.

    `response` is the model's text with special tokens; `prompt` is the text before it, or None if unknown. `answer` and
    `type` are fields of `verification_info`.
    """

    type: str
    response: str
    answer: Any
    prompt: str | None
    verification_info: Mapping[str, Any]


_Reference = TypeVar("_Reference")


@dataclass(frozen=True, slots=True)
class ReferenceFirst(Generic[_Reference]):
    """A verifier function in two stages, so that each fault can be attributed.

    `read` turns an answer into a reference and tries all that comparing will do with it; whatever goes wrong there is a
    failure. `compare` scores a response, finite, against the reference; whatever goes wrong there, exceptions and
    exhausted limits included, is due to the response and scores 0.
    """

    read: Callable[[Any], _Reference]
    compare: Callable[[str, _Reference], float]

    def __call__(self, submission: "Submission") -> float:
        """Score a submission.

        Raises:
            BadAnswerError: the reference is invalid.
        """
        return self.compare(submission.response, self.read(submission.answer))


class ResponseError(Exception):
    """The response itself prevents its verification, so it scores 0; `reason` is for humans."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class VerifierError(Exception):
    """No score: the kind of failure, its detail, and after how many seconds to retry, if that may help.

    `detail` is for humans and holds no secret.
    """

    def __init__(self, kind: FailureKind, detail: str, retry_after: float | None = None) -> None:
        super().__init__(detail)
        self.kind: FailureKind = kind
        self.detail = detail
        self.retry_after = retry_after


class BadAnswerError(VerifierError):
    """The `answer` of a `verification_info` does not have the shape of its type."""

    def __init__(self, detail: str) -> None:
        super().__init__("bad_request", detail)


class UnavailableError(VerifierError):
    """This server cannot verify the type: it has no sandbox or judge."""

    def __init__(self, reason: str) -> None:
        super().__init__("bad_request", reason)


class Verifier(Protocol):
    """Scores the submissions of one type. The server limits how many are verified at a time."""

    async def start(self) -> None:
        """Prepare for verification.

        Raises:
            UnavailableError: this server cannot verify the type.
        """
        ...

    def check(self, answer: Any) -> None:
        """Check the shape of an answer, without delay.

        Raises:
            BadAnswerError: the shape is wrong.
        """
        ...

    async def verify(self, submission: Submission) -> Scored:
        """Score a submission whose answer has passed `check`.

        Raises:
            ResponseError: the response scores 0, since it prevents its verification.
            VerifierError: there is no score.
        """
        ...

    async def close(self) -> None:
        """Free processes and connections, and cancel current verifications."""
        ...
