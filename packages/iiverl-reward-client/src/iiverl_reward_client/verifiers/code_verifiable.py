"""`code_verifiable`: the fraction of test cases that a program in a response passes, run in a sandbox."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from iiverl_reward_client.outcomes import Scored
from iiverl_reward_client.verifiers.answers import check_code
from iiverl_reward_client.verifiers.extraction import language_name, last_code_block, split_lines
from iiverl_reward_client.verifiers.verifier import (
    BadAnswerError,
    Submission,
    UnavailableError,
    VerifierError,
)

if TYPE_CHECKING:
    from iiverl_reward_client.verifiers.sandbox import Execution, Sandbox

_NAME = "code_verifiable"
_WALL_PER_CPU = 3.0
"""Wall time of a run per second of CPU time that it may take: programs share the machine, and may also just wait."""


class CodeVerifier:
    """Runs the last fenced block in the requested language once per test case.

    A case is passed by the right output and exit code 0.
    `case_seconds` limits the CPU time of each process of one run, and `_WALL_PER_CPU` times as much its wall time;
    `seconds` limits the wall time of all runs of a submission. A program that exceeds the first fails that case.
    If the time for all is over, the remaining cases are failed if the program timed out before, since it used up the
    time; otherwise there is no score.
    """

    def __init__(self, fusion_url: str | None, *, places: int, case_seconds: float, seconds: float) -> None:
        self._fusion_url = fusion_url
        self._case_seconds = case_seconds
        self._seconds = seconds
        self._threads = ThreadPoolExecutor(places, thread_name_prefix="code-verifier")
        self._sandbox: Sandbox | None = None
        self._languages = {"python"}  # that the sandbox has run

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
        language = language_name(submission.answer.get("language") or "python")
        cases: list[dict[str, str]] = submission.answer["test_cases"]
        loop = asyncio.get_running_loop()
        if language not in self._languages:  # part of the reference, so it comes before the response
            await loop.run_in_executor(self._threads, self._run, "", "", language, self._seconds)
            self._languages.add(language)
        source = last_code_block(submission.response, language)
        if source is None:
            return Scored(0.0, info={"passed": 0, "test_cases": len(cases), "program": "none found"})
        return await loop.run_in_executor(self._threads, self._run_all, source, cases, language)

    async def close(self) -> None:
        """Start no further case; a current run ends at its own limit."""
        self._sandbox = None
        await asyncio.to_thread(self._threads.shutdown, wait=True, cancel_futures=True)

    def _run_all(self, source: str, cases: list[dict[str, str]], language: str) -> Scored:
        deadline = time.monotonic() + self._seconds
        passed = overran = 0
        for done, case in enumerate(cases):
            left = deadline - time.monotonic()
            if left <= 0 and overran:
                break
            if left <= 0:
                raise VerifierError("timeout", f"{done} of {len(cases)} test cases took {self._seconds:g} s")
            execution = self._run(source, case["input"], language, left)
            overran += execution.ended == "timeout"
            passed += execution.exit_code == 0 and _same(execution.stdout, case["output"])
        return Scored(
            passed / len(cases),
            info={"passed": passed, "test_cases": len(cases), "overran": overran},
        )

    def _run(self, source: str, stdin: str, language: str, left: float) -> "Execution":
        """Run a program on one input, for `left` seconds at most."""
        from iiverl_reward_client.verifiers.sandbox import Limits, SandboxError, UnsupportedLanguage

        if self._sandbox is None:
            raise VerifierError("overload", "the server is shutting down")
        cpu, wall = self._case_seconds, min(_WALL_PER_CPU * self._case_seconds, left)
        limits = replace(Limits(), wall_seconds=wall, cpu_seconds=min(cpu, wall))
        try:
            return self._sandbox.run(source, stdin, language=language, limits=limits)
        except UnsupportedLanguage as error:
            raise BadAnswerError(f"{_NAME}: {error}") from error
        except SandboxError as error:
            raise VerifierError("server", f"{_NAME}: the sandbox failed: {error}") from error


def _same(output: str, expected: str) -> bool:
    """Compare as in programming contests: ignore white space at the ends of lines, and blank lines around the text."""
    return _lines(output) == _lines(expected)


def _lines(text: str) -> list[str]:
    return [line.rstrip(" \t") for line in split_lines(text.strip(" \t\r\n"))]
