"""The format score: whether a response has the format of a reasoning model's answer."""

import re

from iiverl_reward_client.outcomes import Scored
from iiverl_reward_client.verifiers.extraction import code_blocks, last_box
from iiverl_reward_client.verifiers.verifier import Submission

ANSWER_WEIGHT, FORMAT_WEIGHT = 0.9, 0.1

# Han (with extensions), kana, Bopomofo, Hangul and their punctuation. The bars and blocks of special tokens such as
# <｜Assistant｜> and <｜end▁of▁sentence｜> are not included.
_CJK = re.compile(
    "[\u1100-\u11ff\u2e80-\u2fdf\u3000-\u30ff\u3100-\u312f\u3130-\u318f\u31a0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003134f]"
)

_NEEDS_BOX = {"math_verifiable"}
_NEEDS_CODE = {"code_verifiable", "swe_verifiable"}


def format_score(submission: Submission, end_token: str) -> float:
    """Return 1.0 if the response has the complete format, else 0.0.

    It must have a `<think>…</think>` block, which the prompt may have opened, end with `end_token`, contain no CJK text,
    and have a box (mathematics) or a fenced block (code).
    """
    response = submission.response
    if (submission.prompt or "").rstrip().endswith("<think>"):
        response = f"<think>{response}"
    opened = response.find("<think>")
    if opened < 0 or response.find("</think>", opened) < 0:
        return 0.0
    if not response.rstrip().endswith(end_token) or _CJK.search(response):
        return 0.0
    if submission.type in _NEEDS_BOX and last_box(response) is None:
        return 0.0
    if submission.type in _NEEDS_CODE and not code_blocks(response):
        return 0.0
    return 1.0


def with_format(scored: Scored, format_score: float) -> Scored:
    """Combine the answer's score (0.9) and the format score (0.1); both are components of the result."""
    blended = ANSWER_WEIGHT * scored.score + FORMAT_WEIGHT * format_score
    components = {**scored.components, "answer": scored.score, "format": format_score}
    return Scored(blended, components, scored.info)
