"""What a verifier's function returned, as the parts of a score that JSON can carry."""

import json
import math
from collections.abc import Mapping
from numbers import Real
from typing import Any


class NoScoreError(ValueError):
    """What a function returned is no score."""


def parts_of(returned: Any) -> dict[str, Any]:
    """Give `score`, `components` and `info` of what a function returned.

    A finite number or a truth value is the score. So is `score` of a mapping, whose other finite numbers become
    `components` and the rest `info`.

    Raises:
        NoScoreError: it is neither.
    """
    if not isinstance(returned, Mapping):
        return {"score": _score(returned, "returned"), "components": {}, "info": {}}
    if "score" not in returned:
        raise NoScoreError(
            f"returned a dict without 'score'; its keys: {', '.join(map(str, returned)) or 'none'}"
        )
    components: dict[str, float] = {}
    info: dict[str, Any] = {}
    for key, value in returned.items():
        number = _number(value)
        if number is None:
            info[str(key)] = _carried(value)
        elif key != "score":
            components[str(key)] = number
    return {
        "score": _score(returned["score"], "returned a dict whose 'score' is"),
        "components": components,
        "info": info,
    }


def _score(value: Any, said: str) -> float:
    number = _number(value)
    if number is None:
        raise NoScoreError(
            f"{said} {repr(value)[:80]} of type {type(value).__name__}, which is no finite number"
        )
    return number


def _number(value: Any) -> float | None:
    """Give a number as a float, numpy's and tensors of one element included; None for all else."""
    if not isinstance(value, Real) and callable(getattr(value, "item", None)):
        try:
            value = value.item()
        except (TypeError, ValueError, RuntimeError):  # an array of several elements
            return None
    if not isinstance(value, Real):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _carried(value: Any) -> Any:
    """Give a value as it is where JSON has a word for it, else as text."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return repr(value)
    return value
