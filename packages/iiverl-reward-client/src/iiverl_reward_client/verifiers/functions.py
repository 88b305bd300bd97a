"""Verify with a Python function of a submission, in worker processes."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from iiverl_reward_client.outcomes import FailureKind, Scored
from iiverl_reward_client.verifiers.processes import VerifierProcessError, WorkerLimits, WorkerPool
from iiverl_reward_client.verifiers.verifier import (
    ResponseError,
    Submission,
    UnavailableError,
    VerifierError,
)


class FunctionVerifier:
    """Scores by the function at `target`, in `places` processes.

    The function takes a `Submission` and returns a finite number, or a dict with `score`; it may be a coroutine
    function, or a `ReferenceFirst`. With a `check` it is one of this package, and an exception before the response is
    looked at is a failure of kind `server`. Otherwise it is the user's: an exception is of kind `function`, and `start`
    waits until it is loaded, to report errors early.
    """

    def __init__(
        self,
        target: str,
        *,
        places: int,
        limits: WorkerLimits,
        check: Callable[[Any], None] | None = None,
        hidden_variables: Sequence[str] = (),
    ) -> None:
        self._check = check
        self._target = target
        self._pool = WorkerPool(target, places, limits, hidden_variables)

    async def start(self) -> None:
        """Check that a user's function can be loaded; raises `UnavailableError` if not."""
        if self._check is not None:
            return
        try:
            await self._pool.start()
        except VerifierProcessError as error:
            raise UnavailableError(f"the verifier {self._target} cannot be used: {error}") from None

    def check(self, answer: Any) -> None:
        """Check the shape of an answer, if the type has one."""
        if self._check is not None:
            self._check(answer)

    async def verify(self, submission: Submission) -> Scored:
        """Score a submission in the next idle process."""
        try:
            reply = await self._pool.call(asdict(submission))
        except VerifierError as failed:
            raise VerifierError(failed.kind, f"{submission.type}: {failed.detail}") from failed
        if "unearned" in reply:
            raise ResponseError(reply["unearned"])
        if "raised" in reply:
            kind: FailureKind = "function" if self._check is None else "server"
            raise VerifierError(kind, f"{submission.type}: {reply['raised']}")
        if "failed" in reply:
            raise VerifierError(reply["failed"], reply["detail"], reply["retry_after"])
        return Scored(reply["score"], reply["components"], reply["info"])

    async def close(self) -> None:
        """Kill the processes."""
        await self._pool.close()
