"""`code_verifiable`: the fraction of test cases that a program in a response passes, run in a sandbox."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from iiverl_reward_client.outcomes import Scored
from iiverl_reward_client.verifiers.answers import check_code
from iiverl_reward_client.verifiers.extraction import last_code_block
from iiverl_reward_client.verifiers.verifier import (
    BadAnswerError,
    Submission,
    UnavailableError,
    VerifierError,
)

if TYPE_CHECKING:
    from iiverl_reward_client.verifiers.sandbox import Sandbox

_NAME = "code_verifiable"


class CodeVerifier:
    """Runs the last fenced block in the requested language once per test case.

    `case_seconds` limits one run, `seconds` all runs of a submission. A program that exceeds the first fails that case.
    If the time for all is over, the remaining cases are failed if the program timed out before, since it used up the
    time; otherwise there is no score.
    """

    def __init__(self, fusion_url: str | None, *, places: int, case_seconds: float, seconds: float) -> None:
        self._fusion_url = fusion_url
        self._case_seconds = case_seconds
        self._seconds = seconds
        self._threads = ThreadPoolExecutor(places, thread_name_prefix="code-verifier")
        self._sandbox: Sandbox | None = None

    async def start(self) -> None:
        """Find a sandbox; raises `UnavailableError` with the reason if there is none."""
        from iiverl_reward_client.verifiers.sandbox import SandboxUnavailable, find_sandbox

        try:
            self._sandbox = await asyncio.to_thread(find_sandbox, self._fusion_url)
        except SandboxUnavailable as error:
            raise UnavailableError(f"{_NAME} needs a sandbox: {error}") from None

    def check(self, answer: Any) -> None:
        """Check the shape of an answer."""
        check_code(answer)

    async def verify(self, submission: Submission) -> Scored:
        """Run the program; a response without a block in the language scores 0.0."""
        language = submission.answer.get("language", "python")
        source = last_code_block(submission.response, language)
        cases: list[dict[str, str]] = submission.answer["test_cases"]
        if source is None:
            return Scored(0.0, info={"passed": 0, "test_cases": len(cases), "program": "none found"})
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._run_all, source, cases, language)

    async def close(self) -> None:
        """Start no further case; a current run ends at its own limit."""
        self._sandbox = None
        await asyncio.to_thread(self._threads.shutdown, wait=True, cancel_futures=True)

    def _run_all(self, source: str, cases: list[dict[str, str]], language: str) -> Scored:
        from iiverl_reward_client.verifiers.sandbox import Limits, SandboxError, UnsupportedLanguage

        deadline = time.monotonic() + self._seconds
        passed = overran = 0
        for done, case in enumerate(cases):
            sandbox = self._sandbox
            if sandbox is None:
                raise VerifierError("overload", "the server is shutting down")
            left = deadline - time.monotonic()
            if left <= 0 and overran:
                break
            if left <= 0:
                raise VerifierError("timeout", f"{done} of {len(cases)} test cases took {self._seconds:g} s")
            seconds = min(self._case_seconds, left)
            limits = replace(Limits(), wall_seconds=seconds, cpu_seconds=seconds)
            try:
                execution = sandbox.run(source, case["input"], language=language, limits=limits)
            except UnsupportedLanguage as error:
                raise BadAnswerError(f"{_NAME}: {error}") from error
            except SandboxError as error:
                raise VerifierError("server", f"{_NAME}: the sandbox failed: {error}") from error
            overran += execution.ended == "timeout"
            passed += execution.ended == "exit" and _same(execution.stdout, case["output"])
        return Scored(
            passed / len(cases),
            info={"passed": passed, "test_cases": len(cases), "overran": overran},
        )


def _same(output: str, expected: str) -> bool:
    """Compare as in programming contests: ignore white space at the ends of lines and of the text."""
    return [line.rstrip() for line in output.strip().splitlines()] == [
        line.rstrip() for line in expected.strip().splitlines()
    ]
