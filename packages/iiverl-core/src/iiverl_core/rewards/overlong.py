"""Penalize responses that come close to the length limit."""

from collections.abc import Mapping
from dataclasses import replace

from iiverl_core.samples import SampleId
from iiverl_reward_client import Outcome, Scored

OVERLONG_PENALTY = "overlong_penalty"
"""The component of a score that holds the penalty."""


def shape_overlong(
    outcomes: Mapping[SampleId, Outcome],
    lengths: Mapping[SampleId, int],
    *,
    limit: int,
    buffer: int,
    factor: float,
) -> dict[SampleId, Outcome]:
    """Lower the scores of long responses: the soft overlong punishment of DAPO (arXiv:2503.14476, equation 13).

    With L the maximum tokens of a response (`limit`), c the `buffer` before it, and |y| the tokens of the response
    (`lengths`), end of sequence included, this is added to each score:

        min((L - c - |y|) / c, 0) · factor

    It is 0 up to L - c tokens and falls linearly to -factor at L. With a factor of 1 that is the paper's; its last case,
    responses that are too long, corresponds to L tokens here, where a response is cut off. Each score has the penalty,
    even 0, as the component `overlong_penalty`. Failures, and constants that `apply_failure_policy` put in their place,
    do not change. Shaping is for training only; validation reports the scorer's scores.

    Raises:
        ValueError: the buffer is not between 1 and the limit.
    """
    if not 1 <= buffer <= limit:
        raise ValueError(
            f"the buffer is {buffer} tokens, and must be at least 1 and at most the limit, {limit}"
        )

    def shaped(outcome: Outcome, length: int) -> Outcome:
        if not isinstance(outcome, Scored) or "failed" in outcome.info:
            return outcome
        penalty = min((limit - buffer - length) / buffer, 0.0) * factor
        components = {**outcome.components, OVERLONG_PENALTY: penalty}
        return replace(outcome, score=outcome.score + penalty, components=components)

    return {key: shaped(outcome, lengths[key]) for key, outcome in outcomes.items()}
