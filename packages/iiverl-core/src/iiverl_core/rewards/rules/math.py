r"""The rule of the MATH datasets: the last `\boxed{…}` is the answer, compared in normal form."""

from iiverl_core.rewards.rules.normal_form import normal_form
from iiverl_reward_client.verifiers.extraction import last_box


def score(response: str, ground_truth: str) -> float:
    r"""Score 1 if the last box of the response equals the ground truth in normal form, else 0; 0 without a box.

    The ground truth may be the answer or a solution with the answer in a box. Answers are compared as strings after
    `normal_form`, as in Hendrycks et al., "Measuring Mathematical Problem Solving With the MATH Dataset"
    (arXiv:2103.03874), so `x+1` is not `1+x`.

    Raises:
        ValueError: the ground truth is empty.
    """
    truth = str(ground_truth)
    boxed_truth = last_boxed(truth)
    expected = normal_form(truth if boxed_truth is None else boxed_truth)
    if not expected:
        raise ValueError(
            f"the ground truth of a MATH row is an answer such as \\frac{{1}}{{2}}, not {truth!r}"
        )
    return 1.0 if answer(response) == expected else 0.0


def answer(response: str) -> str | None:
    """Return the content of a response's last box in normal form, or None if there is none."""
    boxed = last_boxed(response)
    return None if boxed is None else normal_form(boxed)


def last_boxed(text: str) -> str | None:
    r"""Return the content of a text's last whole box, as the reward server finds it, without surrounding spaces."""
    box = last_box(text)
    return None if box is None else box.strip()
