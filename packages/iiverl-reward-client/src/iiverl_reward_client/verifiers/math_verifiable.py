r"""`math_verifiable`: compare the last `\boxed{…}` of a response with a reference, using Math-Verify."""

import logging

from math_verify import parse, verify

from iiverl_reward_client.verifiers.extraction import last_box
from iiverl_reward_client.verifiers.verifier import BadAnswerError, Submission

# It warns at each start that its timeouts are off; its process is killed instead.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def score(submission: Submission) -> float:
    """Return 1.0 if the last box equals the reference, else 0.0; a response without a box scores 0.0.

    Raises:
        BadAnswerError: Math-Verify finds nothing to compare with in the reference.
    """
    value = submission.answer["value"].strip()
    reference = value if (box := last_box(value)) is None else box.strip()
    found = last_box(submission.response)
    if found is None:
        return 0.0
    if found.strip() == reference:
        return 1.0
    expected = parse(f"\\boxed{{{reference}}}", parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    if not expected:
        raise BadAnswerError(f"math_verifiable: Math-Verify cannot read answer.value {value[:100]!r}")
    given = parse(f"\\boxed{{{found}}}", parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    return float(verify(expected, given, timeout_seconds=None))
