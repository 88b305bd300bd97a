"""Check the shape of `answer` by type, before verification, so that invalid rows are reported immediately."""

from collections.abc import Mapping
from typing import Any

from iiverl_reward_client.verifiers.verifier import BadAnswerError


def check_math(answer: Any) -> None:
    """Check that an answer is `{"value": text}` with text that is not blank; raises `BadAnswerError`."""
    if not _text(answer, "value", "math_verifiable: answer").strip():
        raise BadAnswerError("math_verifiable: answer.value is blank")


def check_swe(answer: Any) -> None:
    """Check that an answer is `{"input": text, "ground_truth": text}`; raises `BadAnswerError`."""
    _text(answer, "input", "swe_verifiable: answer")
    _text(answer, "ground_truth", "swe_verifiable: answer")


def check_judge(answer: Any) -> None:
    """Check that an answer is `{"value": text}`; raises `BadAnswerError`."""
    _text(answer, "value", "llm_judge: answer")


def check_code(answer: Any) -> None:
    """Check that an answer is `{"test_cases": [{"input": text, "output": text}, …], "language"?: text}`.

    Raises:
        BadAnswerError: it is not, or has no test case.
    """
    cases = answer.get("test_cases") if isinstance(answer, Mapping) else None
    if not isinstance(cases, list) or not cases:
        raise BadAnswerError("code_verifiable: answer is an object with 'test_cases', a list of at least one")
    for number, case in enumerate(cases):
        for name in ("input", "output"):
            _text(case, name, f"code_verifiable: answer.test_cases[{number}]")
    if answer.get("language") is not None:  # tables fill missing fields with nulls
        _text(answer, "language", "code_verifiable: answer")


def _text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, Mapping):
        raise BadAnswerError(f"{where} is an object with {name!r}, not {type(value).__name__}")
    if name not in value:
        raise BadAnswerError(f"{where} lacks {name!r}")
    if not isinstance(value[name], str):
        raise BadAnswerError(f"{where}.{name} is a string, not {type(value[name]).__name__}")
    return value[name]
