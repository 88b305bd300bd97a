"""The rule of `hiyouga/geometry3k`: nine tenths for the answer, one tenth for the form."""

from iiverl_core.rewards.rules import math

_FORMAT_SHARE = 0.1


def score(response: str, ground_truth: str) -> float:
    r"""Score 0.9 · accuracy + 0.1 · format.

    Accuracy is that of the MATH rule. Format is 1 where the response begins with `<think>`, and `</think>` and then a
    `\boxed{…}` follow. The shares are verl's, which compares answers symbolically where this rule compares their
    normal forms.

    Raises:
        ValueError: the ground truth is empty.
    """
    accuracy = math.score(response, ground_truth)
    return (1.0 - _FORMAT_SHARE) * accuracy + _FORMAT_SHARE * _format(response)


def _format(response: str) -> float:
    if not response.lstrip().startswith("<think>"):
        return 0.0
    _, thought_ended, answer = response.partition("</think>")
    _, box_opened, boxed = answer.partition("\\boxed{")
    return 1.0 if thought_ended and box_opened and "}" in boxed else 0.0
