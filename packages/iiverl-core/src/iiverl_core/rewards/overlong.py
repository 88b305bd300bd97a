"""A punishment for responses that come near to the length at which they are cut off."""

from collections.abc import Mapping
from dataclasses import replace

from iiverl_core.samples import SampleId
from iiverl_reward_client import Outcome, Scored

OVERLONG_PENALTY = "overlong_penalty"
"""The component of a score that tells the punishment."""


def shape_overlong(
    outcomes: Mapping[SampleId, Outcome],
    lengths: Mapping[SampleId, int],
    *,
    limit: int,
    buffer: int,
    factor: float,
) -> dict[SampleId, Outcome]:
    """Lower the scores of long responses: the soft overlong punishment of DAPO (arXiv:2503.14476, equation 13).

    With L the most tokens a response may have (`limit`), c those of the `buffer` before it, and |y| the tokens of a
    response (`lengths`), end of sentence included, a score gets

        min((L - c - |y|) / c, 0) · factor

    added: nothing up to L - c tokens, and from there linearly down to -factor at L. With a factor of 1 that is the
    paper's; its last case, of responses that are too long, is that of L tokens here, where a response is cut off.
    Every score tells its part as the component `overlong_penalty`, 0 included. Failures, and constants that `apply_failure_policy`
    put in their place, stay what they are. The shaping is meant for training: validation tells what the scorer said.

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
