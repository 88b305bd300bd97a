"""The seam between the server and what verifies: what is verified, and how a verification can end."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from iiverl_reward_client.outcomes import FailureKind, Scored


@dataclass(frozen=True, slots=True)
class Submission:
    """A response to be verified, and what it is held against.

    `response` is the model's text alone, with special tokens kept; `prompt` is what came before it, None where that is
    not known. `answer` and `type` are those of `verification_info`, which is here as a whole too.
    """

    type: str
    response: str
    answer: Any
    prompt: str | None
    verification_info: Mapping[str, Any]


class VerifierError(Exception):
    """No score: of what kind the failure is, what happened, and after how many seconds to try again, if that helps.

    `detail` is for the person who reads it and holds no secret.
    """

    def __init__(self, kind: FailureKind, detail: str, retry_after: float | None = None) -> None:
        super().__init__(detail)
        self.kind: FailureKind = kind
        self.detail = detail
        self.retry_after = retry_after


class BadAnswerError(VerifierError):
    """The `answer` of a `verification_info` is not of the shape that its type has."""

    def __init__(self, detail: str) -> None:
        super().__init__("bad_request", detail)


class UnavailableError(VerifierError):
    """This server has no means to verify the type: no sandbox, no judge."""

    def __init__(self, reason: str) -> None:
        super().__init__("bad_request", reason)


class Verifier(Protocol):
    """Scores the submissions of one type. The server bounds how many are verified at a time."""

    async def start(self) -> None:
        """Make ready.

        Raises:
            UnavailableError: there is no means to verify this type here.
        """
        ...

    def check(self, answer: Any) -> None:
        """See that an answer has the type's shape; returns at once.

        Raises:
            BadAnswerError: it has not.
        """
        ...

    async def verify(self, submission: Submission) -> Scored:
        """Score a submission whose answer has passed `check`.

        Raises:
            VerifierError: there is no score.
        """
        ...

    async def close(self) -> None:
        """Free processes and connections; what is being verified is dropped."""
        ...
