"""The protocols of reward servers: write samples into requests and read responses."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

from iiverl_reward_client.outcomes import Failed, FailureKind, Outcome, Scored
from iiverl_reward_client.protocol import (
    as_text,
    finite_number,
    outcome_of_success,
    parsed,
    request_payload,
    shortened,
)
from iiverl_reward_client.sample import RewardSample

ProtocolName: TypeAlias = Literal["auto", "reward", "v1", "openrlhf", "slime"]

_MAX_SHOWN = 120
_TRANSIENT: set[FailureKind] = {"transport", "timeout", "overload", "server"}
# A sample that took too long in the server takes too long again.
_TRANSIENT_FOR_A_SAMPLE: set[FailureKind] = _TRANSIENT - {"timeout"}
_to_json = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


@dataclass(frozen=True, slots=True)
class Attempt:
    """The result of one request for one sample.

    `retry` says that another attempt may succeed, after `retry_after` seconds; `alone` that the sample has to be sent
    by itself to find out whether it caused the failure.
    """

    outcome: Outcome
    retry: bool = False
    retry_after: float | None = None
    alone: bool = False


@dataclass(frozen=True, slots=True)
class Reading:
    """A parsed response: an attempt per sample of the request, in order, and the server's version."""

    attempts: list[Attempt]
    server_version: str | None = None


@dataclass(frozen=True, slots=True)
class Dialect:
    """One protocol.

    Requests `POST` JSON to `path` below the server's URL. `item` encodes a sample as one or several JSON texts, and
    raises `TypeError` or `ValueError` if JSON cannot represent it; `body` joins the items of a request; `read` parses a
    response with status 200. `ping` is the path of a `GET` that shows whether the server is up; with `ping_is_200`, it
    must return 200.
    """

    path: str
    ping: str
    ping_is_200: bool
    batches: bool
    item: Callable[[RewardSample], tuple[str, ...]]
    body: Callable[[Sequence[tuple[str, ...]]], str]
    read: Callable[[bytes, Sequence[RewardSample]], Reading]


@dataclass(frozen=True, slots=True)
class Capabilities:
    """The capabilities that a server of the `/v1/rewards` protocol reports.

    `types` are the `verification_info` types that it verifies; `unavailable` has the reason for each that it cannot;
    `max_batch` is the maximum samples per request, `max_body_bytes` the maximum bytes; `max_seconds` is the longest that
    verifying one sample may take, without waiting for a place.
    """

    protocol: str
    server_version: str
    types: tuple[str, ...] = ()
    unavailable: Mapping[str, str] = field(default_factory=dict)
    max_batch: int | None = None
    max_body_bytes: int | None = None
    max_seconds: float | None = None


def read_capabilities(body: str | bytes) -> Capabilities | None:
    """Parse the response to `GET /v1/capabilities`; None if it is another protocol's."""
    answer = parsed(body)
    if not isinstance(answer, dict) or not str(answer.get("protocol", "")).startswith("iiverl-rewards/1"):
        return None
    types, unavailable = answer.get("types"), answer.get("unavailable")
    return Capabilities(
        answer["protocol"],
        str(answer.get("server_version", "")),
        tuple(map(str, types)) if isinstance(types, list) else (),
        {str(k): str(v) for k, v in unavailable.items()} if isinstance(unavailable, dict) else {},
        _positive(answer.get("max_batch")),
        _positive(answer.get("max_body_bytes")),
        finite_number(answer.get("max_seconds")),
    )


def after_failure(failure: Failed) -> Attempt:
    """Return what the failure of a whole request means for each of its samples."""
    return Attempt(failure, failure.kind in _TRANSIENT)


def _positive(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _first(items: Sequence[tuple[str, ...]]) -> str:
    return items[0][0]


def _label(sample: RewardSample) -> Any:
    label = sample.verification_info if sample.label is None else sample.label
    return dict(label) if isinstance(label, Mapping) else label


# POST /reward: one sample per request.


def _reward_item(sample: RewardSample) -> tuple[str, ...]:
    return (_to_json(request_payload(sample.llm_output, sample.verification_info)),)


def _reward_read(body: bytes, samples: Sequence[RewardSample]) -> Reading:
    return Reading([Attempt(outcome_of_success(body))])


# POST /v1/rewards: many samples per request, a result for each.


def _v1_item(sample: RewardSample) -> tuple[str, ...]:
    info = sample.verification_info
    if not isinstance(info, str | Mapping):
        raise TypeError(f"verification_info must be a JSON string or a mapping, not {type(info).__name__}")
    return (
        _to_json(
            {
                "id": sample.id,
                "llm_output": sample.llm_output,
                "prompt": sample.prompt,
                "response": sample.response,
                "verification_info": dict(info) if isinstance(info, Mapping) else info,
            }
        ),
    )


def _v1_body(items: Sequence[tuple[str, ...]]) -> str:
    return '{"samples":[' + ",".join(item[0] for item in items) + "]}"


def _v1_read(body: bytes, samples: Sequence[RewardSample]) -> Reading:
    answer = parsed(body)
    results = answer.get("results") if isinstance(answer, dict) else None
    if not isinstance(results, list) or len(results) != len(samples):
        wanted = f'{{"results": […]}} with {len(samples)} results'
        return Reading(_all_bad(f"expected {wanted}, got {_brief(body)}", len(samples)))
    version = answer.get("server_version")
    attempts = [_v1_result(result, sample) for result, sample in zip(results, samples, strict=True)]
    return Reading(attempts, version if isinstance(version, str) else None)


def _v1_result(result: Any, sample: RewardSample) -> Attempt:
    if not isinstance(result, dict) or result.get("id") != sample.id:
        return _bad(f"expected the result of sample {sample.id!r}, got {_brief(repr(result))}")
    if "error" in result:
        return _v1_error(result["error"])
    score = finite_number(result.get("score"))
    if score is None:
        return _bad(f"the score is not a finite number: {_brief(repr(result.get('score')))}")
    info = result.get("info")
    return Attempt(
        Scored(score, _finite_parts(result.get("components")), info if isinstance(info, dict) else {})
    )


def _v1_error(error: Any) -> Attempt:
    kind: FailureKind | None = error.get("kind") if isinstance(error, dict) else None
    if kind is None or kind not in get_args(FailureKind):
        return _bad(f"the server reports an error of unknown kind: {_brief(repr(error))}")
    wait = finite_number(error.get("retry_after"))
    again = kind in _TRANSIENT_FOR_A_SAMPLE
    return Attempt(Failed(kind, detail=str(error.get("detail", "")), outage=again), again, wait)


def _finite_parts(parts: Any) -> dict[str, float]:
    if not isinstance(parts, dict):
        return {}
    numbers = {name: finite_number(value) for name, value in parts.items()}
    return {name: number for name, number in numbers.items() if number is not None}


# OpenRLHF's remote reward model: {query, prompts, labels} → {rewards, scores?, extra_logs?}, lists all of them.


def _openrlhf_item(sample: RewardSample) -> tuple[str, ...]:
    return _to_json(sample.llm_output), _to_json(sample.prompt), _to_json(_label(sample))


def _openrlhf_body(items: Sequence[tuple[str, ...]]) -> str:
    queries, prompts, labels = (",".join(column) for column in zip(*items, strict=True))
    return f'{{"query":[{queries}],"prompts":[{prompts}],"labels":[{labels}]}}'


def _openrlhf_read(body: bytes, samples: Sequence[RewardSample]) -> Reading:
    answer = parsed(body)
    rewards = answer.get("rewards") if isinstance(answer, dict) else None
    if not isinstance(rewards, list) or len(rewards) != len(samples):
        wanted = f'{{"rewards": […]}} with {len(samples)} numbers'
        return Reading(_all_bad(f"expected {wanted}, got {_brief(body)}", len(samples)))
    logs = answer.get("extra_logs")
    columns = {"scores": answer.get("scores"), **(logs if isinstance(logs, dict) else {})}
    columns = {name: c for name, c in columns.items() if isinstance(c, list) and len(c) == len(samples)}
    attempts = []
    for i, reward in enumerate(rewards):
        number = finite_number(reward)
        if number is None:
            attempts.append(_bad(f"the reward is not a finite number: {_brief(repr(reward))}"))
        else:
            parts = _finite_parts({name: column[i] for name, column in columns.items()})
            attempts.append(Attempt(Scored(number, parts)))
    return Reading(attempts)


# slime's remote reward model: {prompt, response, label} → a number, or an object that holds it.


def _slime_item(sample: RewardSample) -> tuple[str, ...]:
    return (_to_json({"prompt": sample.prompt, "response": sample.response, "label": _label(sample)}),)


def _slime_read(body: bytes, samples: Sequence[RewardSample]) -> Reading:
    answer = parsed(body)
    rest = dict(answer) if isinstance(answer, dict) else {}
    given = next((rest.pop(key) for key in ("score", "reward") if key in rest), None) if rest else answer
    number = finite_number(given)
    if number is None:
        wanted = 'a number, or {"score": number} or {"reward": number}'
        return Reading([_bad(f"expected {wanted}, got {_brief(body)}")])
    return Reading([Attempt(Scored(number, info=rest))])


def _bad(detail: str) -> Attempt:
    return Attempt(Failed("bad_response", detail=detail))


def _all_bad(detail: str, count: int) -> list[Attempt]:
    return [_bad(detail)] * count


def _brief(body: str | bytes) -> str:
    return shortened(as_text(body), _MAX_SHOWN)


REWARD = Dialect("/reward", "/ping", True, False, _reward_item, _first, _reward_read)
V1 = Dialect("/v1/rewards", "/ping", True, True, _v1_item, _v1_body, _v1_read)
OPENRLHF = Dialect("", "", False, True, _openrlhf_item, _openrlhf_body, _openrlhf_read)
SLIME = Dialect("", "", False, False, _slime_item, _first, _slime_read)
