"""Each verifier's score, by tables."""

import difflib
import math
from typing import Any

import numpy as np
import pytest

from iiverl_reward_client.verifiers import (
    BadAnswerError,
    Submission,
    answers,
    math_verifiable,
    swe_verifiable,
)
from iiverl_reward_client.verifiers.worker import NoScoreError, parts_of


def submission(type: str, response: str, answer: Any) -> Submission:
    return Submission(type, response, answer, None, {})


@pytest.mark.parametrize(
    ("response", "value", "expected"),
    [
        ("so \\boxed{420}", "420", 1.0),
        ("so \\boxed{421}", "420", 0.0),
        ("so 420", "420", 0.0),
        ("\\boxed{420} no, \\boxed{1}", "420", 0.0),
        ("\\boxed{1} no, \\boxed{420}", "420", 1.0),
        ("\\boxed{0.5}", "\\frac{1}{2}", 1.0),
        ("\\boxed{\\frac12}", "$\\frac{1}{2}$", 1.0),
        ("\\boxed{2\\sqrt{3}}", "\\sqrt{12}", 1.0),
        ("\\boxed{(1, 2)}", "(1,2)", 1.0),
        ("\\boxed{(2, 1)}", "(1,2)", 0.0),
        ("\\boxed{\\{2, 1\\}}", "\\{1,2\\}", 1.0),
        ("\\boxed{1,000}", "1000", 1.0),
        ("\\boxed{x = 3}", "3", 1.0),
        ("\\boxed{420}", "The answer is \\boxed{420}", 1.0),
        ("\\boxed{(x+1)^2}", "x^2+2x+1", 1.0),
        ("\\boxed{C}", "C", 1.0),
        ("\\boxed{}", "420", 0.0),
        ("\\boxed{((((}", "420", 0.0),
    ],
)
def test_mathematics(response: str, value: str, expected: float) -> None:
    assert math_verifiable.score(submission("math_verifiable", response, {"value": value})) == expected


def test_a_reference_that_cannot_be_read_is_no_zero() -> None:
    with pytest.raises(BadAnswerError, match="cannot read"):
        math_verifiable.score(submission("math_verifiable", "\\boxed{1}", {"value": "$$"}))


BEFORE = "a\nb\nc\n"


def similarity(first: str, second: str) -> float:
    return difflib.SequenceMatcher(None, first, second, autojunk=False).ratio()


@pytest.mark.parametrize(
    ("response", "truth", "expected"),
    [
        ("```\na\nB\nc\n```", "a\nB\nc\n", 1.0),
        ("```\nx\n```\n```\na\nB\nc\n```", "a\nB\nc\n", 1.0),
        ("a\nB\nc\n", "a\nB\nc\n", 0.0),
        ("```\na\nb\nc\n```", "a\nB\nc\n", 0.0),
        ("```\na\nB\nc\n```", BEFORE, 0.0),
        (
            "```\na\nX\nc\n```",
            "a\nB\nc\n",
            similarity("@@ -1,3 +1,3 @@\n a\n-b\n+X\n c", "@@ -1,3 +1,3 @@\n a\n-b\n+B\n c"),
        ),
    ],
)
def test_edits(response: str, truth: str, expected: float) -> None:
    answer = {"input": BEFORE, "ground_truth": truth}
    assert swe_verifiable.score(submission("swe_verifiable", response, answer)) == pytest.approx(expected)


def test_long_edits_are_compared_without_junk() -> None:
    before = "".join(f"line {n}\n" for n in range(100))
    truth, edit = before.replace("line", "word"), before.replace("line", "wort")
    scored = swe_verifiable.score(
        submission("swe_verifiable", f"```\n{edit}```", {"input": before, "ground_truth": truth})
    )
    assert 0.9 < scored < 1.0


@pytest.mark.parametrize(
    ("check", "answer", "said"),
    [
        (answers.check_math, {"value": 420}, "answer.value is a string, not int"),
        (answers.check_math, {"value": " "}, "blank"),
        (answers.check_math, "420", "answer is an object with 'value', not str"),
        (answers.check_swe, {"input": ""}, "lacks 'ground_truth'"),
        (answers.check_judge, {}, "lacks 'value'"),
        (answers.check_code, {"test_cases": []}, "at least one"),
        (
            answers.check_code,
            {"test_cases": [{"input": "", "output": 1}]},
            "test_cases[0].output is a string",
        ),
        (answers.check_code, {"test_cases": [{"input": "", "output": ""}], "language": 3}, "answer.language"),
    ],
)
def test_an_answer_of_another_shape_is_told(check: Any, answer: Any, said: str) -> None:
    with pytest.raises(BadAnswerError) as told:
        check(answer)
    assert said in told.value.detail
    assert told.value.kind == "bad_request"


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        (1, (1.0, {}, {})),
        (True, (1.0, {}, {})),
        (np.float32(0.5), (0.5, {}, {})),
        (np.bool_(True), (1.0, {}, {})),
        ({"score": 0.25, "n": 3, "why": "so"}, (0.25, {"n": 3.0}, {"why": "so"})),
        ({"score": 1, "nan": math.nan, "set": {1}}, (1.0, {}, {"nan": "nan", "set": "{1}"})),
    ],
)
def test_what_functions_may_return(returned: Any, expected: tuple[Any, ...]) -> None:
    assert tuple(parts_of(returned).values()) == expected


@pytest.mark.parametrize(
    "returned",
    [None, "1", math.nan, math.inf, 10**400, {}, {"score": None}, {"score": math.nan}, [1], np.zeros(2)],
)
def test_what_is_no_score(returned: Any) -> None:
    with pytest.raises(NoScoreError):
        parts_of(returned)
