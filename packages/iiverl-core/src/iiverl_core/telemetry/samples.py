"""Write the samples of a step, and the requests to a reward server with its answers, as parquet files."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import pyarrow as pa
import pyarrow.parquet as pq

from iiverl_core.columns import verification_info_of
from iiverl_core.samples import Rollout, SampleId, Split
from iiverl_reward_client import Failed, Outcome, Scored


class SampleNumbers(TypedDict, total=False):
    """Numbers computed for a sample; those that are absent are null in the file.

    `reward` is the score after KL, `baseline` the score of the greedy response to the same prompt, `advantage` the mean
    over the response's tokens, and `…_log_prob_sum` the log-probability of the whole response in nats, at the sampling
    temperature: under the policy before the update, and under the reference.
    """

    reward: float
    baseline: float
    advantage: float
    old_log_prob_sum: float
    ref_log_prob_sum: float


SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("data_source", pa.string()),
        ("source", pa.string()),
        ("row", pa.int64()),
        ("group", pa.int64()),
        ("member", pa.int64()),
        ("prompt", pa.string()),
        ("response", pa.string()),
        ("ground_truth", pa.string()),
        ("score", pa.float64()),
        ("outcome", pa.string()),
        ("failure_detail", pa.string()),
        ("components", pa.string()),
        ("reward", pa.float64()),
        ("baseline", pa.float64()),
        ("advantage", pa.float64()),
        ("rollout_log_prob_sum", pa.float64()),
        ("old_log_prob_sum", pa.float64()),
        ("ref_log_prob_sum", pa.float64()),
        ("response_length", pa.int64()),
        ("finish_reason", pa.string()),
        ("weights_version", pa.int64()),
        ("weights_spans", pa.string()),
        ("messages", pa.string()),
        ("images", pa.list_(pa.string())),
    ]
)

IMAGES = "images"
"""Folder of thumbnails beside the samples, `{name}.jpg` each; `images` of a sample are such names."""

SCORED_COLUMNS = [
    ("id", pa.string()),
    ("data_source", pa.string()),
    ("llm_output", pa.string()),
    ("verification_info", pa.string()),
    ("score", pa.float64()),
    ("response", pa.string()),
    ("outcome", pa.string()),
    ("detail", pa.string()),
    ("attempts", pa.int64()),
    ("seconds", pa.float64()),
    ("components", pa.string()),
    ("group", pa.int64()),
    ("member", pa.int64()),
    ("weights_version", pa.int64()),
]
"""`llm_output`, `verification_info`, `score`, and `id` and `data_source` if the dataset has them, are II-VERL's columns."""


def write_samples(
    folder: Path,
    step: int,
    rollouts: Sequence[Rollout],
    numbers: Mapping[SampleId, SampleNumbers] | None = None,
) -> Path:
    """Write the samples of a training step to `{folder}/{step}.parquet`, ordered by group and member.

    `source` and `row` are the dataset and the row there, counted from 0. `outcome` is `scored`, the kind of the failure, or null if the sample was not scored; a failed sample has no score.
    `ground_truth` is the string, or JSON if it is not a string; `components` is JSON. `messages`, of rollouts of several
    turns, is JSON: the conversation, with `tokens` and `reward` in the messages that the policy wrote.
    `weights_spans`, of responses that newer weights continued, is JSON: version and number of tokens, in the order in which
    they were sampled. The file is written atomically and replaces the one of the same step. `images` are the names of
    thumbnails (`IMAGES`), each of which is written once.
    """
    numbers = numbers or {}
    ordered = sorted(rollouts, key=lambda rollout: rollout.id)
    rows = [_row(step, rollout, numbers.get(rollout.id, {})) for rollout in ordered]
    path = folder / f"{step}.parquet"
    _write_thumbnails(folder / IMAGES, {image.name: image.data for each in ordered for image in each.images})
    write_parquet(path, pa.Table.from_pylist(rows, schema=SCHEMA))
    return path


def _write_thumbnails(folder: Path, images: Mapping[str, bytes]) -> None:
    if images:
        folder.mkdir(parents=True, exist_ok=True)
    for name, data in images.items():
        path = folder / f"{name}.jpg"
        if not path.exists():
            unfinished = folder / f".{name}.{os.getpid()}"
            unfinished.write_bytes(data)
            unfinished.replace(path)


def sample_files(folder: Path) -> dict[int, Path]:
    """Find the files that `write_samples` wrote to a folder, by step; none if there is no such folder."""
    return {int(path.stem): path for path in folder.glob("*.parquet") if path.stem.isdigit()}


def write_scored(folder: Path, split: Split, step: int, rollouts: Sequence[Rollout], column: str) -> Path:
    """Write what a reward server was sent and answered to `{folder}/{split}/{step}.parquet`.

    `column` holds the dataset's verification info. `outcome` is `scored` or the kind of the failure, with its reason in
    `detail` and the number of attempts in `attempts`; `seconds` is how long scoring took.
    """
    rows = [_scored_row(rollout, column) for rollout in rollouts]
    absent = {name for name in ("id", "data_source") if all(row[name] is None for row in rows)}
    schema = pa.schema([each for each in SCORED_COLUMNS if each[0] not in absent])
    path = folder / split / f"{step}.parquet"
    write_parquet(path, pa.Table.from_pylist(rows, schema=schema))
    return path


def write_parquet(path: Path, table: pa.Table) -> None:
    """Write a file atomically, and create its parent folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        pq.write_table(table, unfinished, compression="zstd")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _row(step: int, rollout: Rollout, numbers: SampleNumbers) -> dict[str, Any]:
    prompt = rollout.prompt
    return {
        "step": step,
        "data_source": utf8(prompt.data_source),
        "source": utf8(prompt.source),
        "row": prompt.source_row,
        "group": rollout.id.group,
        "member": rollout.id.member,
        "prompt": utf8(prompt.text),
        "response": utf8(rollout.text),
        "ground_truth": as_text(prompt.ground_truth),
        **_outcome(rollout),
        "rollout_log_prob_sum": rollout.log_prob,
        **numbers,
        "response_length": rollout.response_length,
        "finish_reason": rollout.finish_reason,
        "weights_version": rollout.weights_version,
        "weights_spans": to_json([each._asdict() for each in rollout.spans]) if rollout.spans else None,
        "messages": None if rollout.messages is None else to_json(_conversation(rollout)),
        "images": [image.name for image in rollout.images] or None,
    }


def _conversation(rollout: Rollout) -> list[dict[str, Any]]:
    messages = [dict(message) for message in rollout.messages or ()]
    for turn in rollout.turns:
        messages[turn.message] |= {"tokens": turn.tokens, "reward": turn.reward}
    return messages


def _outcome(rollout: Rollout) -> dict[str, Any]:
    match rollout.outcome:
        case Scored(score, components):
            return {"outcome": "scored", "score": score, "components": to_json(components)}
        case Failed(kind=kind, detail=detail):
            return {"outcome": kind, "failure_detail": utf8(detail)}
        case _:
            return {}


def _scored_row(rollout: Rollout, column: str) -> dict[str, Any]:
    prompt = rollout.prompt
    identity = prompt.columns.get("id")
    return {
        "id": None if identity is None else str(identity),
        "data_source": prompt.data_source or None,
        "llm_output": utf8(prompt.text + rollout.raw_text),
        "verification_info": as_text(verification_info_of(prompt.columns, column) or None),
        "response": utf8(rollout.raw_text),
        **_scored_outcome(rollout.outcome),
        "group": rollout.id.group,
        "member": rollout.id.member,
        "weights_version": rollout.weights_version,
    }


def _scored_outcome(outcome: Outcome | None) -> dict[str, Any]:
    """Describe an outcome, also a constant that replaced a score."""
    match outcome:
        case Scored(score, components, info):
            return {
                "score": score,
                "outcome": info.get("failed", "scored"),
                "detail": info.get("detail") if "failed" in info else None,
                "seconds": info.get("seconds"),
                "components": to_json(components),
            }
        case Failed(kind, attempts, detail):
            return {"outcome": kind, "detail": utf8(detail), "attempts": attempts}
        case None:
            return {}


def as_text(value: Any) -> str | None:
    """Write a value as the string it is, or as JSON; None stays None."""
    return value if value is None else utf8(value) if isinstance(value, str) else to_json(value)


def to_json(value: Any) -> str:
    """Write a value as JSON; values that JSON does not support are converted."""
    return utf8(json.dumps(value, ensure_ascii=False, default=_plain))


def _plain(value: Any) -> Any:
    """Convert a mapping, a numpy array or number, or else the value's text."""
    if isinstance(value, Mapping):
        return dict(value)
    return value.tolist() if hasattr(value, "tolist") else str(value)


def utf8(text: str) -> str:
    """Replace unpaired surrogates, which UTF-8 cannot encode."""
    return text.encode("utf-8", "replace").decode("utf-8")
