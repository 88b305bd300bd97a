"""The reward server's wire protocol as pure functions: what is sent, and what an answer means.

One sample is one `POST /reward` with the JSON object of `request_payload`. The server answers 200 with
`{"score": number}`, and anything else with `{"detail": …}`; `outcome_of` turns either into an `Outcome`.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

from iiverl_reward_client.outcomes import Failed, FailureKind, Outcome, Scored

_DETAIL_LENGTH = 300
_BODY_LENGTH = 120


def request_payload(llm_output: str, verification_info: str | Mapping[str, Any]) -> dict[str, str]:
    """Build the JSON object of `POST /reward`.

    `llm_output` is prompt and response together, decoded with special tokens kept. `verification_info` is a JSON
    document in a string, which passes through unread, or a mapping, which is written as JSON.

    Raises:
        TypeError: `verification_info` is neither a string nor a mapping, or holds what JSON cannot.
        ValueError: `verification_info` holds NaN or an infinity, which JSON has no word for.
    """
    if isinstance(verification_info, Mapping):
        document = json.dumps(dict(verification_info), ensure_ascii=False, allow_nan=False)
    elif isinstance(verification_info, str):
        document = verification_info
    else:
        raise TypeError(
            f"verification_info is a JSON string or a mapping, not {type(verification_info).__name__}"
        )
    return {"llm_output": llm_output, "verification_info": document}


def outcome_of(status: int, body: str | bytes, attempts: int = 1) -> Outcome:
    """Say what the server's answer means. No answer ever raises, and none but a finite number is a score.

    A score's answer may hold more than the score: the rest is `Scored.info`. `attempts` is passed on to `Failed`.
    """
    if status == 200:
        return outcome_of_success(body, attempts)
    return failure_of_status(status, body, attempts)


def failure_of_status(status: int, body: str | bytes, attempts: int = 1) -> Failed:
    """Say what an answer with another status than 200 means."""
    said = server_detail(body)
    detail = f"HTTP {status}: {said}" if said else f"HTTP {status}"
    return Failed(failure_kind(status), attempts, detail)


def outcome_of_success(body: str | bytes, attempts: int = 1) -> Outcome:
    """Read the body of an answer with status 200."""
    answer = parsed(body)
    if not isinstance(answer, dict) or "score" not in answer:
        detail = f'expected {{"score": number}}, got {shortened(as_text(body), _BODY_LENGTH)!r}'
        return Failed("bad_response", attempts, detail)
    score = answer.pop("score")
    number = finite_number(score)
    if number is None:
        shown = shortened(repr(score), _BODY_LENGTH)
        return Failed("bad_response", attempts, f"the score is no finite number: {shown}")
    return Scored(number, info=answer)


def failure_kind(status: int) -> FailureKind:
    """Say what kind of failure an HTTP status means."""
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
    """Give a JSON number as a float; None where it is of another type, not finite, or too large for a float."""
    if isinstance(score, bool) or not isinstance(score, int | float):
        return None
    try:
        number = float(score)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def server_detail(body: str | bytes) -> str:
    """Find what the server says went wrong: `detail` of a JSON object, else the body as it is."""
    answer = parsed(body)
    if isinstance(answer, dict) and "detail" in answer:
        detail = answer["detail"]
        said = detail if isinstance(detail, str) else json.dumps(detail, ensure_ascii=False)
    else:
        said = as_text(body)
    return shortened(" ".join(said.split()), _DETAIL_LENGTH)


def parsed(body: str | bytes) -> Any:
    """Parse JSON; None for what is no JSON, or nested or long beyond what Python reads."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def as_text(body: str | bytes) -> str:
    """Decode a body for a message."""
    return body if isinstance(body, str) else body.decode("utf-8", errors="replace")


def shortened(text: str, length: int) -> str:
    """Cut a text that is too long for a message."""
    return text if len(text) <= length else f"{text[: length - 1]}…"
