"""The rule of `hiyouga/geometry3k`: nine tenths for the answer, one tenth for the format."""

from iiverl_core.rewards.rules import math

_FORMAT_WEIGHT = 0.1


def score(response: str, ground_truth: str) -> float:
    r"""Score 0.9 · accuracy + 0.1 · format.

    Accuracy is the MATH rule's. Format is 1 if the response begins with `<think>`, and `</think>` and then a
    `\boxed{…}` follow. The weights are verl's, which compares answers symbolically; this rule compares normal forms.

    Raises:
        ValueError: the ground truth is empty.
    """
    accuracy = math.score(response, ground_truth)
    return (1.0 - _FORMAT_WEIGHT) * accuracy + _FORMAT_WEIGHT * _format(response)


def _format(response: str) -> float:
    if not response.lstrip().startswith("<think>"):
        return 0.0
    _, thought_ended, answer = response.partition("</think>")
    _, box_opened, boxed = answer.partition("\\boxed{")
    return 1.0 if thought_ended and box_opened and "}" in boxed else 0.0
