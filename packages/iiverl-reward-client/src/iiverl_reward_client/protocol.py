"""The wire protocol of `POST /reward` as pure functions.

A request has one sample, the JSON object of `request_payload`. The server responds with 200 and `{"score": number}`, or
with another status and `{"detail": …}`; `outcome_of` turns either into an `Outcome`.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

from iiverl_reward_client.outcomes import Failed, FailureKind, Outcome, Scored

_DETAIL_LENGTH = 300
_BODY_LENGTH = 120
_MAX_DEPTH = 64


def request_payload(llm_output: str, verification_info: str | Mapping[str, Any]) -> dict[str, str]:
    """Build the JSON object of `POST /reward`.

    `llm_output` is the prompt and the response, decoded with special tokens. `verification_info` is a JSON document as a
    string, which is sent unchanged, or a mapping, which is written as JSON.

    Raises:
        TypeError: `verification_info` is neither a string nor a mapping, or JSON cannot represent it.
        ValueError: `verification_info` holds NaN or an infinity.
    """
    if isinstance(verification_info, Mapping):
        document = json.dumps(dict(verification_info), ensure_ascii=False, allow_nan=False)
    elif isinstance(verification_info, str):
        document = verification_info
    else:
        raise TypeError(
            f"verification_info must be a JSON string or a mapping, not {type(verification_info).__name__}"
        )
    return {"llm_output": llm_output, "verification_info": document}


def outcome_of(status: int, body: str | bytes, attempts: int = 1) -> Outcome:
    """Interpret a response. No response raises, and only a finite number is a score.

    Fields other than the score become `Scored.info`. `attempts` is passed to `Failed`.
    """
    if status == 200:
        return outcome_of_success(body, attempts)
    return failure_of_status(status, body, attempts)


def failure_of_status(status: int, body: str | bytes, attempts: int = 1) -> Failed:
    """Interpret a response with a status other than 200."""
    text = server_detail(body)
    detail = f"HTTP {status}: {text}" if text else f"HTTP {status}"
    return Failed(failure_kind(status), attempts, detail)


def outcome_of_success(body: str | bytes, attempts: int = 1) -> Outcome:
    """Interpret the body of a response with status 200."""
    answer = parsed(body)
    if not isinstance(answer, dict) or "score" not in answer:
        detail = f'expected {{"score": number}}, got {shortened(as_text(body), _BODY_LENGTH)!r}'
        return Failed("bad_response", attempts, detail)
    score = answer.pop("score")
    number = finite_number(score)
    if number is None:
        shown = shortened(repr(score), _BODY_LENGTH)
        return Failed("bad_response", attempts, f"the score is not a finite number: {shown}")
    return Scored(number, info=answer)


def failure_kind(status: int) -> FailureKind:
    """Return the failure kind of an HTTP status."""
    if status in (429, 503):
        return "overload"
    if status == 408:
        return "timeout"
    if 400 <= status < 500:
        return "bad_request"
    if 500 <= status < 600:
        return "server"
    return "bad_response"


def finite_number(score: Any) -> float | None:
    """Convert a JSON number to a float; None if it has another type, is not finite, or is too large."""
    if isinstance(score, bool) or not isinstance(score, int | float):
        return None
    try:
        number = float(score)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def server_detail(body: str | bytes) -> str:
    """Return the server's error message: `detail` of a JSON object, or else the body."""
    answer = parsed(body)
    if isinstance(answer, dict) and "detail" in answer:
        detail = answer["detail"]
        text = detail if isinstance(detail, str) else json.dumps(detail, ensure_ascii=False)
    else:
        text = as_text(body)
    return shortened(" ".join(text.split()), _DETAIL_LENGTH)


def parsed(body: str | bytes) -> Any:
    """Parse JSON; None if it is invalid, exceeds Python's limits or is nested more than 64 levels deep."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError, MemoryError):
        return None
    return value if _is_shallow(value) else None


def _is_shallow(value: Any) -> bool:
    """Return whether a JSON value is nested at most `_MAX_DEPTH` levels deep, so that recursion over it is safe."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [
            part
            for each in level
            if isinstance(each, dict | list)
            for part in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return True
    return False


def as_text(body: str | bytes) -> str:
    """Decode a body for a message."""
    return body if isinstance(body, str) else body.decode("utf-8", errors="replace")


def shortened(text: str, length: int) -> str:
    """Shorten a text for a message."""
    return text if len(text) <= length else f"{text[: length - 1]}…"
