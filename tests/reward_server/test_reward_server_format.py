"""The format score."""

import pytest

from iiverl_reward_client import Scored
from iiverl_reward_client.verifiers import Submission
from iiverl_reward_client.verifiers.format_score import format_score, with_format

END = "<｜end▁of▁sentence｜>"
CODE = "```python\n1\n```"


def submission(type: str, response: str, prompt: str | None = None) -> Submission:
    return Submission(type, response, {}, prompt, {})


@pytest.mark.parametrize(
    ("type", "response", "expected"),
    [
        ("math_verifiable", f"<think>a</think>\\boxed{{1}}{END}", 1.0),
        ("math_verifiable", f"<think>a</think>\\boxed{{1}}{END}\n", 1.0),
        ("math_verifiable", f"<think>a</think>1{END}", 0.0),
        ("math_verifiable", "<think>a</think>\\boxed{1}", 0.0),
        ("math_verifiable", f"a</think>\\boxed{{1}}{END}", 0.0),
        ("math_verifiable", f"</think><think>\\boxed{{1}}{END}", 0.0),
        ("math_verifiable", f"<think>我</think>\\boxed{{1}}{END}", 0.0),
        ("math_verifiable", f"<think>かな</think>\\boxed{{1}}{END}", 0.0),
        ("math_verifiable", f"<think>한</think>\\boxed{{1}}{END}", 0.0),
        ("math_verifiable", f"<think>é∑→</think>\\boxed{{1}}{END}", 1.0),
        ("code_verifiable", f"<think>a</think>{CODE}\n{END}", 1.0),
        ("code_verifiable", f"<think>a</think>\\boxed{{1}}{END}", 0.0),
        ("swe_verifiable", f"<think>a</think>{CODE}\n{END}", 1.0),
        ("llm_judge", f"<think>a</think>b{END}", 1.0),
    ],
)
def test_all_of_the_form_or_nothing(type: str, response: str, expected: float) -> None:
    assert format_score(submission(type, response), END) == expected


def test_the_prompt_may_have_opened_the_thought() -> None:
    response = f"a</think>\\boxed{{1}}{END}"
    assert format_score(submission("math_verifiable", response, "q<｜Assistant｜><think>\n"), END) == 1.0
    assert format_score(submission("math_verifiable", response, "q<｜Assistant｜>"), END) == 0.0


def test_another_end_token() -> None:
    response = "<think>a</think>\\boxed{1}<|im_end|>"
    assert format_score(submission("math_verifiable", response), "<|im_end|>") == 1.0


def test_the_blend() -> None:
    blended = with_format(Scored(0.5, {"n": 2.0}, {"why": "so"}), 1.0)
    assert blended.score == pytest.approx(0.55)
    assert blended.components == {"n": 2.0, "answer": 0.5, "format": 1.0}
    assert blended.info == {"why": "so"}
