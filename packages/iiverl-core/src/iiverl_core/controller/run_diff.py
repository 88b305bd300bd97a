"""Find the first difference of two runs: in configuration, metrics, samples and saved tensors."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from iiverl_core.checkpoints import CONFIG_FILE, VERSIONS_FILE, checkpoints, read_json
from iiverl_core.telemetry import read_history, sample_files, samples_folder

CLOCKS = ("time", "timing", "perf/", "reward/hidden_fraction")
"""First parts of the names of metrics that say how long something took, or how much memory it took."""
NAMED = 5  # of the things that differ at the first place


@dataclass(frozen=True)
class Compared:
    """One kind of results: how many were compared, and where the first difference is, if there is one.

    `only` names what only one of the runs has, and `place` where the first difference is, as `step 17`. `different` names
    the first things that differ there, with both values; `others` counts the rest.
    """

    kind: str
    count: int
    place: str | None = None
    different: Sequence[str] = ()
    others: int = 0
    only: Sequence[str] = ()

    @property
    def equal(self) -> bool:
        """Whether all that both runs have is equal, bit by bit."""
        return self.place is None


@dataclass(frozen=True)
class RunDiff:
    """The differences of two runs; `configuration` is None if one of them did not record its own."""

    configuration: Sequence[str] | None
    results: Sequence[Compared] = field(default_factory=list)


def diff_runs(one: Path, other: Path, progress: Callable[[str], None] = lambda what: None) -> RunDiff:
    """Compare two folders of runs.

    Metrics that are times or memory are left out. Tensors are those of checkpoints of the same step; they are read one
    at a time. `progress` is called with what is read next.

    Raises:
        CheckpointError: tensors of a checkpoint cannot be read.
    """
    results = [_diff_metrics(one, other), _diff_samples(one, other), _diff_tensors(one, other, progress)]
    return RunDiff(_diff_configuration(one, other), results)


def _diff_configuration(one: Path, other: Path) -> list[str] | None:
    found: list[str] = []
    for name in (CONFIG_FILE, VERSIONS_FILE):
        left, right = (_recorded(folder, name) for folder in (one, other))
        if left is None or right is None:
            return None
        values = [dict(_flat(each)) for each in (left, right)]
        found += [
            f"{key}: {_shown(values[0].get(key, '(unknown)'))} -> {_shown(values[1].get(key, '(unknown)'))}"
            for key in sorted(values[0].keys() | values[1].keys())
            if values[0].get(key) != values[1].get(key)
        ]
    return found


def _recorded(folder: Path, name: str) -> dict[str, Any] | None:
    """Read what a run recorded when it started, or else its newest checkpoint."""
    saved = [checkpoint.folder for checkpoint in checkpoints(folder)]
    for place in (folder, *reversed(saved)):
        if (place / name).is_file():
            return read_json(place / name)
    return None


def _flat(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in section.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _diff_metrics(one: Path, other: Path) -> Compared:
    left, right = ({record["step"]: record for record in read_history(folder)} for folder in (one, other))
    common = sorted(left.keys() & right.keys())
    only = _only([f"step {step}" for step in sorted(left.keys() ^ right.keys())])
    for step in common:
        names = [name for name in left[step].keys() | right[step].keys() if not name.startswith(CLOCKS)]
        different = [name for name in sorted(names) if left[step].get(name) != right[step].get(name)]
        if different:
            told = [
                f"{name} {_change(left[step].get(name), right[step].get(name))}" for name in different[:NAMED]
            ]
            return Compared("metrics", len(common), f"step {step}", told, len(different) - len(told), only)
    return Compared("metrics", len(common), only=only)


def _diff_samples(one: Path, other: Path) -> Compared:
    import pyarrow.parquet as pq

    left, right = (sample_files(samples_folder(folder)) for folder in (one, other))
    common = sorted(left.keys() & right.keys())
    only = _only([f"step {step}" for step in sorted(left.keys() ^ right.keys())])
    for step in common:
        tables = [pq.read_table(dumps[step]) for dumps in (left, right)]
        if tables[0].equals(tables[1]):
            continue
        rows = [{(row["group"], row["member"]): row for row in table.to_pylist()} for table in tables]
        different = [
            f"group {group}, response {member}: {', '.join(columns) or 'only in one of them'}"
            for group, member in sorted(rows[0].keys() | rows[1].keys())
            if (columns := _columns(rows[0].get((group, member)), rows[1].get((group, member)))) is not None
        ]
        told = different[:NAMED]
        return Compared("samples", len(common), f"step {step}", told, len(different) - len(told), only)
    return Compared("samples", len(common), only=only)


def _columns(left: Mapping[str, Any] | None, right: Mapping[str, Any] | None) -> list[str] | None:
    """Return the columns that differ; none if only one of the samples is there, and None if they are equal."""
    if left is None or right is None:
        return []
    columns = [name for name in left.keys() | right.keys() if not _same(left.get(name), right.get(name))]
    return sorted(columns) or None


def _same(left: Any, right: Any) -> bool:
    both = isinstance(left, float) and isinstance(right, float)
    return left == right or (both and math.isnan(left) and math.isnan(right))


def _diff_tensors(one: Path, other: Path, progress: Callable[[str], None]) -> Compared:
    from iiverl_core.training.saved_tensors import SavedTensors, differences  # imports torch

    left, right = ({each.step: each for each in checkpoints(folder)} for folder in (one, other))
    common = sorted(left.keys() & right.keys())
    only = _only([f"global_step_{step}" for step in sorted(left.keys() ^ right.keys())])
    for step in common:
        different: list[str] = []
        for role in left[step].roles:
            progress(f"reading global_step_{step}/{role}")
            saved = [SavedTensors(each[step].folder / role) for each in (left, right)]
            different += [f"{role}: {text}" for text in differences(*saved)]
        if different:
            told = different[:NAMED]
            place = f"global_step_{step}"
            return Compared("checkpoints", len(common), place, told, len(different) - len(told), only)
    return Compared("checkpoints", len(common), only=only)


def _only(names: Sequence[str]) -> list[str]:
    return [*names[:NAMED], *([f"and {len(names) - NAMED} others"] if len(names) > NAMED else [])]


def _change(left: Any, right: Any) -> str:
    text = f"{_shown(left)} -> {_shown(right)}"
    if isinstance(left, int | float) and isinstance(right, int | float) and left:
        return f"{text} ({abs(right - left) / abs(left):.2g} of it)"
    return text


def _shown(value: Any) -> str:
    return "absent" if value is None else str(value)
