"""Choose the samples that a report shows, as many as its size allows, from the dumps of a run.

Whole groups are shown, so that a response can be compared with the others to its prompt, and groups from the whole
length of the run. Groups with a failed sample come first.
"""

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from iiverl_core.telemetry.samples import IMAGES, sample_files

BYTES_PER_STEP = 18_000
"""Of samples in a report; with curves and the page itself, 100 steps take less than 2 MB."""
MAX_BYTES = 16 * 2**20
MAX_TEXT = 20_000  # characters of one text
_STEPS_READ = 64  # a dump may be large

COLUMNS = (
    "step", "group", "member", "data_source", "source", "row", "prompt", "response", "ground_truth", "score", "outcome",
    "failure_detail", "components", "reward", "advantage", "rollout_log_prob_sum", "old_log_prob_sum",
    "ref_log_prob_sum", "response_length", "finish_reason", "weights_version", "messages", "images",
)  # fmt: skip


@dataclass(frozen=True)
class ChosenSamples:
    """Samples as dictionaries, without what is null, ordered by step, group and member.

    `total` is how many there are in the dumps of all `steps`, an estimate if `estimated`. `images` are the thumbnails that the
    samples name, in base64.
    """

    samples: list[dict[str, Any]]
    total: int
    estimated: bool
    images: dict[str, str]
    steps: int


def choose_samples(
    folder: Path, max_bytes: int | None = None, *, bytes_per_step: int = BYTES_PER_STEP
) -> ChosenSamples:
    """Choose samples from the files `{folder}/{step}.parquet`, by default of `bytes_per_step` for each file.

    A file that cannot be read, as one that is being written, is left out.
    """
    files = sample_files(folder)
    budget = min(len(files) * bytes_per_step, MAX_BYTES) if max_bytes is None else max_bytes
    tables = [groups for step in spread(sorted(files))[:_STEPS_READ] if (groups := _groups(files[step]))]
    rows = sum(len(group) for groups in tables for group in groups)
    estimated = len(tables) < len(files)
    total = round(rows / len(tables) * len(files)) if tables else 0
    chosen: list[dict[str, Any]] = []
    images: dict[str, str] = {}
    for group in _in_turn(tables):
        seen = {name: _thumbnail(folder, name) for name in _images_of(group) if name not in images}
        size = sum(len(json.dumps(sample, ensure_ascii=False).encode()) for sample in group)
        size += sum(map(len, seen.values()))
        if size > budget:
            if chosen:
                break
            group = group[:1]  # one sample is worth more than none
        chosen += group
        images |= {name: seen[name] for name in _images_of(group) if name in seen}
        budget -= size
    chosen.sort(key=lambda sample: (sample["step"], sample["group"], sample["member"]))
    known = {name: data for name, data in images.items() if data}
    return ChosenSamples(chosen, total, estimated, known, len(files))


def _images_of(samples: Sequence[Mapping[str, Any]]) -> dict[str, None]:
    return dict.fromkeys(name for sample in samples for name in sample.get("images", ()))


def _thumbnail(folder: Path, name: str) -> str:
    """Return a thumbnail in base64; empty if it is not there."""
    try:
        return base64.b64encode((folder / IMAGES / f"{name}.jpg").read_bytes()).decode()
    except OSError:
        return ""


def spread(steps: Sequence[int]) -> list[int]:
    """Order steps so that any first few of them are spread over all: last, first, the middle, quarters, …"""
    if not steps:
        return []
    chosen = dict.fromkeys((len(steps) - 1, 0))
    parts = 2
    while len(chosen) < len(steps):
        chosen |= dict.fromkeys(round(i * (len(steps) - 1) / parts) for i in range(1, parts, 2))
        parts *= 2
    return [steps[i] for i in chosen]


def _groups(path: Path) -> list[list[dict[str, Any]]]:
    """Read the groups of a step, those with a failure first."""
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException):
        return []
    rows = table.select([name for name in COLUMNS if name in table.column_names]).to_pylist()
    groups = [
        [_small(row) for row in rows]
        for _, rows in groupby(
            sorted(rows, key=lambda row: (row["group"], row["member"])), lambda row: row["group"]
        )
    ]
    return sorted(groups, key=lambda group: all(sample.get("outcome") == "scored" for sample in group))


def _small(row: Mapping[str, Any]) -> dict[str, Any]:
    small: dict[str, Any] = {}
    for name, value in row.items():
        if value is None or value == "" or (name == "components" and value == "{}"):
            continue
        if name in ("messages", "components"):
            value = json.loads(value)
        small[name] = _cut(value)
    return small


def _cut(value: Any) -> Any:
    if isinstance(value, str) and len(value) > MAX_TEXT:
        half = MAX_TEXT // 2
        return f"{value[:half]}\n[… {len(value) - 2 * half} characters are left out here …]\n{value[-half:]}"
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, list):
        return [_cut(each) for each in value]
    if isinstance(value, dict):
        return {name: _cut(each) for name, each in value.items()}
    return value


def _in_turn(tables: Sequence[Sequence[list[dict[str, Any]]]]) -> Iterator[list[dict[str, Any]]]:
    """Yield the first group of each step, then the second of each, and so on."""
    for i in range(max(map(len, tables), default=0)):
        yield from (groups[i] for groups in tables if i < len(groups))
