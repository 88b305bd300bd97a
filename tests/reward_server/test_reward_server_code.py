"""`code_verifiable`: what it makes of what a sandbox tells, and once with a real one."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from iiverl_reward_client import Scored
from iiverl_reward_client.verifiers import BadAnswerError, Submission, VerifierError, sandbox
from iiverl_reward_client.verifiers.code_verifiable import CodeVerifier
from iiverl_reward_client.verifiers.sandbox import (
    DEFAULT_LIMITS,
    Execution,
    Limits,
    SandboxError,
    SandboxUnavailable,
    UnsupportedLanguage,
    find_sandbox,
)

Program = Callable[[str, str, Limits], Execution]


class Scripted:
    """A sandbox in which a function of the test plays the program."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.limits: list[Limits] = []

    def run(
        self, source: str, stdin: str = "", *, language: str = "python", limits: Limits = DEFAULT_LIMITS
    ) -> Execution:
        self.limits.append(limits)
        if language != "python":
            raise UnsupportedLanguage(f"no {language} here")
        return self.program(source, stdin, limits)


def told(stdout: str, ended: Any = "exit", code: int | None = 0) -> Execution:
    return Execution(stdout, "", code, ended)


def echo(source: str, stdin: str, limits: Limits) -> Execution:
    return told(stdin)


def score(
    monkeypatch: pytest.MonkeyPatch,
    program: Program,
    *cases: tuple[str, str],
    response: str = "```python\nx\n```",
    seconds: float = 60.0,
    **more: str,
) -> Scored:
    answer = {"test_cases": [{"input": given, "output": wanted} for given, wanted in cases], **more}

    async def run() -> Scored:
        verifier = CodeVerifier(None, places=1, case_seconds=5.0, seconds=seconds)
        monkeypatch.setattr(sandbox, "find_sandbox", lambda url: Scripted(program))
        await verifier.start()
        try:
            return await verifier.verify(Submission("code_verifiable", response, answer, None, {}))
        finally:
            await verifier.close()

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("cases", "expected"),
    [
        ([("1", "1")], 1.0),
        ([("1", "1"), ("2", "3")], 0.5),
        ([("1", "2")], 0.0),
        ([("1 \n2\n\n", "1\n2")], 1.0),
        ([("1\r\n2", "1\n2\n")], 1.0),
        ([("1 2", "1  2")], 0.0),
        ([("", "")], 1.0),
        ([("1\x0c2", "1\n2")], 0.0),
        ([("1\u20282", "1\n2")], 0.0),
        ([("1\x0c", "1")], 0.0),
        ([("\udcff", "\ufffd")], 0.0),
    ],
)
def test_the_share_of_cases(
    monkeypatch: pytest.MonkeyPatch, cases: list[tuple[str, str]], expected: float
) -> None:
    assert score(monkeypatch, echo, *cases).score == expected


def test_a_response_without_a_program_has_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    def program(source: str, stdin: str, limits: Limits) -> Execution:
        raise AssertionError("nothing to run")

    assert score(monkeypatch, program, ("1", "1"), response="none").score == 0.0
    assert score(monkeypatch, program, ("1", "1"), response="```cpp\nx\n```").score == 0.0


@pytest.mark.parametrize(
    ("ended", "expected"), [("exit", 1.0), ("signal", 0.0), ("timeout", 0.0), ("memory", 0.0)]
)
def test_a_program_that_was_killed_has_not_passed(
    monkeypatch: pytest.MonkeyPatch, ended: str, expected: float
) -> None:
    assert (
        score(monkeypatch, lambda *_: told("1", ended, 0 if ended == "exit" else None), ("1", "1")).score
        == expected
    )


@pytest.mark.parametrize("code", [1, 2, 255])
def test_right_output_before_a_crash_has_not_passed(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    assert score(monkeypatch, lambda *_: told("1", code=code), ("1", "1")).score == 0.0


def test_a_sandbox_that_fails_is_no_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    def program(source: str, stdin: str, limits: Limits) -> Execution:
        raise SandboxError("lost")

    with pytest.raises(VerifierError, match="lost") as failed:
        score(monkeypatch, program, ("1", "1"))
    assert failed.value.kind == "server"


def test_a_language_that_the_sandbox_lacks_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadAnswerError, match="no cpp here"):
        score(monkeypatch, echo, ("1", "1"), response="```cpp\nx\n```", language="cpp")
    with pytest.raises(BadAnswerError, match="no cpp here"):  # whatever the response is
        score(monkeypatch, echo, ("1", "1"), response="none", language="cpp")


@pytest.mark.parametrize("language", ["py", "Python", "python3", "Python3.11"])
@pytest.mark.parametrize("fence", ["```python3.10", "~~~Py", "```", "   ```python"])
def test_the_names_of_a_language(monkeypatch: pytest.MonkeyPatch, language: str, fence: str) -> None:
    end = fence.rstrip("pPython3.10")
    response = f"So:\r\n{fence}\r\nx\r\n{end}\r\n"
    assert score(monkeypatch, echo, ("1", "1"), response=response, language=language).score == 1.0


def test_a_program_that_used_up_its_time_fails_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    def program(source: str, stdin: str, limits: Limits) -> Execution:
        time.sleep(limits.wall_seconds)
        return told("", "timeout", None)

    scored = score(monkeypatch, program, *[("1", "1")] * 1000, seconds=0.2)
    assert scored.score == 0.0
    assert scored.info["overran"] < 10


def test_time_lost_without_the_program_is_no_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    def program(source: str, stdin: str, limits: Limits) -> Execution:
        time.sleep(0.15)
        return told("1")

    with pytest.raises(VerifierError) as failed:
        score(monkeypatch, program, *[("1", "1")] * 1000, seconds=0.2)
    assert failed.value.kind == "timeout"


def test_a_program_is_judged_by_its_cpu_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with other work, a program takes longer than its CPU time, which is what it may use up."""
    given: list[Limits] = []

    def program(source: str, stdin: str, limits: Limits) -> Execution:
        given.append(limits)
        return told(stdin)

    assert score(monkeypatch, program, ("1", "1"), seconds=60.0).score == 1.0
    assert score(monkeypatch, program, ("1", "1"), seconds=8.0).score == 1.0
    assert score(monkeypatch, program, ("1", "1"), seconds=2.0).score == 1.0
    assert [limits.cpu_seconds for limits in given] == [5.0, 5.0, pytest.approx(2.0, abs=1.0)]
    assert [limits.wall_seconds for limits in given] == pytest.approx([15.0, 8.0, 2.0], abs=1.0)


def test_a_program_that_only_waits_fails_its_case(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A real sandbox ends it by its wall time, three times the CPU time; one that waits less long passes."""
    try:
        real = find_sandbox(None)
    except SandboxUnavailable as reason:
        pytest.skip(str(reason))
    monkeypatch.setattr(sandbox, "find_sandbox", lambda url: real)

    async def run(seconds: float) -> Scored:
        verifier = CodeVerifier(None, places=1, case_seconds=0.5, seconds=60.0)
        await verifier.start()
        try:
            response = f"```python\nimport time\ntime.sleep({seconds})\nprint(input())\n```"
            answer = {"test_cases": [{"input": "1", "output": "1"}]}
            return await verifier.verify(Submission("code_verifiable", response, answer, None, {}))
        finally:
            await verifier.close()

    assert asyncio.run(run(0.6)).score == 1.0
    waited = asyncio.run(run(600))
    assert (waited.score, waited.info["overran"]) == (0.0, 1)


def test_programs_run_in_the_sandbox_that_is_here(start: Any) -> None:
    try:
        find_sandbox(None)
    except SandboxUnavailable as reason:
        pytest.skip(str(reason))
    server = start()
    response = "```python\nprint(int(input()) * 2)\n```"
    cases = [{"input": str(n), "output": str(2 * n if n < 2 else 0)} for n in range(4)]
    (result,) = server.rewards((response, "code_verifiable", {"test_cases": cases}))
    assert result["score"] == 0.5
    assert result["info"] == {"passed": 2, "test_cases": 4, "overran": 0}


def test_without_a_sandbox_the_type_is_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, start: Any
) -> None:
    def nowhere(url: str | None) -> None:
        raise SandboxUnavailable("no namespaces here")

    monkeypatch.setattr(sandbox, "find_sandbox", nowhere)
    server = start()
    answer = server.reward("x", "code_verifiable", {"test_cases": [{"input": "", "output": ""}]})
    assert (answer.status, answer.body) == (
        400,
        b'{"detail":"code_verifiable needs a sandbox: no namespaces here"}',
    )
    assert "code_verifiable" not in server.get("/v1/capabilities").json["types"]
