"""Each verifier's score, by tables."""

import difflib
import math
from typing import Any

import numpy as np
import pytest

from iiverl_reward_client.verifiers import (
    BadAnswerError,
    ReferenceFirst,
    Submission,
    answers,
    math_verifiable,
    swe_verifiable,
)
from iiverl_reward_client.verifiers.worker import NoScoreError, parts_of, run


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


EQUAL = [
    ("5 cm", "5"),
    (r"5\text{ cm}", "5 cm"),
    (r"10\text{ meters}", r"10\text{ m}"),
    (r"5\text{ cm}^2", "5"),
    ("12 square units", "12"),
    ("1010", "1010_2"),
    ("1010_{2}", "1010_2"),
    (r"\text{Even}", "even"),
    (r"\text{(B)}", "B"),
    (r"\text{C}", "C"),
    ("yx", "xy"),
    ("是的", r"\text{是的}"),
    (r"8:00\text{ a.m.}", "8:00 am"),
    (r"3 \times 10^8", "300000000"),
    (r"90^\circ", "90"),
    ("1,2", r"\{1,2\}"),
    ("5000000", r"5\text{ million}"),
    ("0.333333", r"\frac13"),
    (r"3\frac12", "3.5"),
    (r"\ln 4", r"2\ln 2"),
    (r"2\cdot\sqrt3", r"2\sqrt3"),
    ("50\\%", "0.5"),
    (r"\gcd(a,b)", r"\gcd(a,b)"),
    ("B.", "B"),
    ("5.", "5"),
    ("5", r"\frac{10}{2}."),
    (r"12\,345", "12345"),
    (r"1\ 000\ 000", "10^6"),
    (r"12\,cm", "12"),
    ("10^{6}", "1000000"),
    (r"\frac{10}{4}", "2.5"),
    (r"\frac{4}{8}", r"\frac12"),
    (r"\begin{pmatrix}1 \\ 2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    ("|x|+1", "1+|x|"),
    (r"[-1,2)\cup(3,4]", r"[-1,2) \cup (3,4]"),
]
UNEQUAL = [
    ("silent", "listen"),
    ("ACBD", "ABCD"),
    ("FTF", "TFF"),
    ("不是", "是的"),
    ("5 cm", "5 km"),
    (r"5\text{ cm}", r"5\text{ km}"),
    (r"5\text{ m}^2", r"5\text{ m}^3"),
    ("5 square feet", "5 feet"),
    ("1010_3", "1010_2"),
    ("7_{10}", "7_{8}"),
    (r"\{0,1\}", "(0,1)"),
    ("[0,1)", "[0,1]"),
    ("5", r"5\text{ million}"),
    (r"5\text{ thousand}", r"5\text{ million}"),
    (r"8:00\text{ a.m.}", r"8:00\text{ p.m.}"),
    (r"8\text{ a.m.}", r"8\text{ p.m.}"),
    ("9:00", "8:00"),
    (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}"),
    ("0", r"\frac{1}{2^{98}}"),
    ("123456789012346", "123456789012345"),
    ("123456789.1", "123456789"),
    ("10^{30}+1", "10^{30}"),
    (r"12\,345", "12"),
]
# Each is equal to its reference, and no answer.
RESTATED = [
    (r"\int_0^1 x^2\,dx", "1/3"),
    (r"\gcd(1071,462)", "21"),
    (r"123 \cdot 456", "56088"),
    ("(3)(4)", "12"),
    ("3+4", "7"),
    ("2^{10}", "1024"),
    ("5!", "120"),
    (r"\binom{5}{2}", "10"),
    (r"\sqrt{16}", "4"),
    (r"\log_2 8", "3"),
    (r"\sin(30^\circ)", "1/2"),
    (r"\sum_{i=1}^{3} i", "6"),
    (r"\lim_{x\to 0}\frac{\sin x}{x}", "1"),
    ("|-3|", "3"),
    (r"\left|-3\right|", "3"),
    (r"\lvert -3 \rvert", "3"),
    (r"\frac{d}{dx}(3x)", "3"),
    (r"\frac{6}{2}", "3"),
    ("6/2", "3"),
    (r"6 \div 2", "3"),
    ("e^0", "1"),
    ("x-x+3", "3"),
    ("(3-2,1+1)", "(1,2)"),
    (r"\{1+1,3\}", r"\{2,3\}"),
    (r"[\sqrt{4}, 5)", "[2,5)"),
]


@pytest.mark.parametrize(("given", "value"), EQUAL)
def test_answers_of_one_meaning(given: str, value: str) -> None:
    assert mathematics(given, value) == 1.0


@pytest.mark.parametrize(("given", "value"), [*UNEQUAL, *RESTATED])
def test_answers_that_only_look_alike(given: str, value: str) -> None:
    assert mathematics(given, value) == 0.0
    assert mathematics(value, value) == 1.0


@pytest.mark.parametrize(("given", "value"), [(r"123 \cdot 456", "56088"), ("2^{10}", "1024")])
def test_restated_problems_are_an_option(given: str, value: str) -> None:
    assert mathematics(given, value, math_verifiable.score_unevaluated) == 1.0


def mathematics(given: str, value: str, score: Any = math_verifiable.score) -> float:
    return score(submission("math_verifiable", f"\\boxed{{{given}}}", {"value": value}))


@pytest.mark.parametrize("value", ["$$", r"\text{}"])
@pytest.mark.parametrize("response", ["\\boxed{1}", "no box", ""])
def test_a_reference_that_cannot_be_read_is_no_zero(value: str, response: str) -> None:
    with pytest.raises(BadAnswerError, match="cannot read"):
        math_verifiable.score(submission("math_verifiable", response, {"value": value}))


def test_only_what_the_response_causes_scores_zero() -> None:
    def broken(*_: Any) -> Any:
        raise RecursionError("too deep")

    given = submission("x", "", None)
    assert run(ReferenceFirst(lambda answer: answer, broken), given)["unearned"].startswith("RecursionError")
    assert run(ReferenceFirst(broken, lambda *_: 1.0), given)["raised"].startswith("RecursionError")
    assert run(broken, given)["raised"].startswith("RecursionError")


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


def test_edits_of_thousands_of_lines_are_compared_by_lines() -> None:
    before = "".join(f"line {n}\n" for n in range(3000))
    truth = before.replace("line 1", "word 1")  # 1111 lines
    edit = truth.replace("word 1999\n", "")

    def similar(block: str) -> float:
        answer = {"input": before, "ground_truth": truth}
        return swe_verifiable.score(submission("swe_verifiable", f"```\n{block}```", answer))

    assert similar(truth) == 1.0
    assert 0.99 < similar(edit) < 1.0
    assert 0.0 < similar(before.replace("line 12", "word 12")) < 0.5
    assert similar("x\n" * 3000) < 0.5


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
