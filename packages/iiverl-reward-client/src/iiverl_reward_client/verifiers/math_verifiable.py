r"""`math_verifiable`: compare the last box of a response with a reference, using Math-Verify.

Math-Verify decides whether two expressions have the same value. What it would overlook is decided before, by their
written forms (`math_form`), and after, by comparing numbers exactly.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import sympy
from math_verify import parse, verify

from iiverl_reward_client.verifiers import math_form
from iiverl_reward_client.verifiers.extraction import last_box
from iiverl_reward_client.verifiers.verifier import BadAnswerError, ReferenceFirst

# It warns at each start that its timeouts are off; its process is killed instead.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_REFERENCES_KEPT = 256  # all responses to a prompt have the same
# No answer is that much longer than its reference.
_SPARE_CHARACTERS = 2000
# Relative, for numbers that are not both exact; Math-Verify rounds to six decimals, which says nothing of small numbers.
_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class _Reference:
    """The reference as it is written, and as Math-Verify reads it; nothing if it is to be compared as text."""

    written: str
    parsed: tuple[Any, ...]


@lru_cache(_REFERENCES_KEPT)
def _read_value(value: str) -> _Reference:
    box = last_box(value)
    written = math_form.trimmed(value if box is None else box)
    if math_form.is_text(written):
        return _Reference(written, ())
    parsed = _parse(written)
    if parsed:
        # What is wrong with the reference must come to light before a response is blamed for it.
        verify(list(parsed), list(_parse("0")), timeout_seconds=None)
    elif not math_form.as_text(written):
        raise BadAnswerError(f"math_verifiable: Math-Verify cannot read answer.value {value[:100]!r}")
    return _Reference(written, parsed)


def _read(answer: Any) -> _Reference:
    return _read_value(answer["value"])


def _compare(response: str, reference: _Reference, *, accept_unevaluated: bool) -> float:
    found = last_box(response)
    if found is None:
        return 0.0
    found = math_form.trimmed(found)
    if found == reference.written:
        return 1.0
    if len(found) > 4 * len(reference.written) + _SPARE_CHARACTERS:
        return 0.0
    if not reference.parsed:
        return float(math_form.as_text(found) == math_form.as_text(reference.written))
    if math_form.differ(found, reference.written):
        return 0.0
    if not accept_unevaluated and math_form.restates(found, reference.written):
        return 0.0
    given = _parse(found)
    expected = list(reference.parsed)
    return float(
        bool(given)
        and verify(expected, list(given), timeout_seconds=None)
        and not _are_different_numbers(expected[0], given[0])
    )


def _parse(written: str) -> tuple[Any, ...]:
    text = math_form.readable(written)
    return tuple(parse(f"\\boxed{{{text}}}", parsing_timeout=None))  # pyright: ignore[reportArgumentType]


def _are_different_numbers(expected: Any, given: Any) -> bool:
    """Compare two numbers exactly if both are rational, else by their relative difference."""
    if not all(isinstance(each, sympy.Expr) and each.is_number for each in (expected, given)):
        return False
    first, second = expected.doit(), given.doit()
    if first.is_Rational and second.is_Rational:
        return first != second
    size = max(abs(first.evalf()), abs(second.evalf()))
    return bool(size > 0 and abs((first - second).evalf()) > _TOLERANCE * size)


def _comparing(*, accept_unevaluated: bool) -> Callable[[str, _Reference], float]:
    def compare(response: str, reference: _Reference) -> float:
        return _compare(response, reference, accept_unevaluated=accept_unevaluated)

    return compare


score = ReferenceFirst(_read, _comparing(accept_unevaluated=False))
r"""Returns 1.0 if the last box equals the reference, else 0.0.

An answer with operators that the reference does not have, such as `\gcd(1071, 462)` for 21, scores 0.0: it restates the
problem.
"""

score_unevaluated = ReferenceFirst(_read, _comparing(accept_unevaluated=True))
"""Returns the same, but accepts answers that restate the problem."""
