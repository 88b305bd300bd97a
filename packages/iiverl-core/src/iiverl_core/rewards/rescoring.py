"""Score the samples of an earlier run again, to compare another or a fixed reward server with the old one."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from iiverl_core.errors import ConfigError
from iiverl_reward_client import Failed, Outcome, RewardSample, Scored, SyncRewardClient

_NEEDED = ("llm_output", "verification_info", "score")
_SAME = 1e-9


@dataclass(frozen=True)
class Difference:
    """A sample whose score changed: its file and row, both scores, and the response."""

    file: str
    row: int
    before: float
    after: float
    text: str


@dataclass(frozen=True)
class Comparison:
    """Scores before and after.

    `same`, `higher` and `lower` count the samples that have both, and the means are over these. `gained` counts samples
    with only a new score; `failed` have no new one. `differences` starts with the largest.
    """

    same: int
    higher: int
    lower: int
    gained: int
    failed: list[Failed]
    mean_before: float
    mean_after: float
    differences: list[Difference]


def read_dumps(place: Path) -> pa.Table:
    """Read a file of scored samples, or all files below a folder in order of steps, and add the column `file`.

    These are the files of `reward_api.save_dir`, or those that II-VERL writes.

    Raises:
        ConfigError: there is no such file, or it is not of this kind.
    """
    files = dump_files(place)
    tables = [_read(file, str(file.relative_to(place)) if place.is_dir() else file.name) for file in files]
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise ConfigError(
            f"{place}: its files do not have the same columns ({error}). Score them one by one."
        ) from error


def dump_files(place: Path) -> list[Path]:
    """List the parquet files at or below a path, in order of steps.

    Raises:
        ConfigError: there are none.
    """
    if place.is_file():
        return [place]
    files = sorted(place.rglob("*.parquet"), key=lambda file: (str(file.parent), _step(file), file.name))
    if not files:
        what = "holds no parquet file" if place.is_dir() else "does not exist"
        raise ConfigError(
            f"{place} {what}. Name a file that a run wrote, such as debug_data/train/10.parquet, or its folder."
        )
    return files


def rescore(table: pa.Table, client: SyncRewardClient, advance: Callable[[], None]) -> list[Outcome]:
    """Score the rows of a table again, in order; `advance` is called after each."""
    names = ["llm_output", "verification_info", *(["response"] if "response" in table.column_names else [])]
    samples = [_sample(i, **row) for i, row in enumerate(table.select(names).to_pylist())]
    outcomes: dict[str, Outcome] = {}
    for sample, outcome in client.score_stream(samples):
        outcomes[sample.id] = outcome
        advance()
    return [outcomes[sample.id] for sample in samples]


def compare(table: pa.Table, outcomes: Sequence[Outcome]) -> Comparison:
    """Compare the new outcomes with the scores in the table."""
    old = _scores(table)
    pairs = [
        (i, before, outcome.score)
        for i, (before, outcome) in enumerate(zip(old, outcomes, strict=True))
        if before is not None and isinstance(outcome, Scored)
    ]
    changed = [(i, before, after) for i, before, after in pairs if abs(after - before) > _SAME]
    changed.sort(key=lambda pair: -abs(pair[2] - pair[1]))
    higher = sum(after > before for _, before, after in changed)
    return Comparison(
        same=len(pairs) - len(changed),
        higher=higher,
        lower=len(changed) - higher,
        gained=sum(isinstance(outcome, Scored) for outcome in outcomes) - len(pairs),
        failed=[outcome for outcome in outcomes if isinstance(outcome, Failed)],
        mean_before=_mean([before for _, before, _ in pairs]),
        mean_after=_mean([after for _, _, after in pairs]),
        differences=[_difference(table, i, before, after) for i, before, after in changed],
    )


def with_outcomes(table: pa.Table, outcomes: Sequence[Outcome]) -> pa.Table:
    """Add the new outcomes as columns `new_score`, `new_outcome`, `new_detail` and `new_components` (JSON)."""
    scored = [outcome if isinstance(outcome, Scored) else None for outcome in outcomes]
    failed = [outcome if isinstance(outcome, Failed) else None for outcome in outcomes]
    columns = {
        "new_score": pa.array([each and each.score for each in scored], pa.float64()),
        "new_outcome": pa.array([each.kind if each else "scored" for each in failed], pa.string()),
        "new_detail": pa.array([each and each.detail for each in failed], pa.string()),
        "new_components": pa.array(
            [each and json.dumps(dict(each.components)) for each in scored], pa.string()
        ),
    }
    for name, column in columns.items():
        table = table.drop_columns(name) if name in table.column_names else table
        table = table.append_column(name, column)
    return table


def _read(file: Path, name: str) -> pa.Table:
    try:
        table = pq.ParquetFile(file).read()
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"{file} cannot be read as parquet: {error}") from error
    if missing := [column for column in _NEEDED if column not in table.column_names]:
        raise ConfigError(
            f"{file} has no column {' or '.join(missing)}, so it is not a file of reward_api.save_dir. "
            f"It has: {', '.join(table.column_names)}."
        )
    table = table.drop_columns("file") if "file" in table.column_names else table
    return table.append_column("file", pa.array([name] * len(table), pa.string()))


def _sample(
    number: int, llm_output: str, verification_info: str | None, response: str | None = None
) -> RewardSample:
    """Convert a row to a sample; the prompt is the text before the response, if that is known."""
    known = response is not None and llm_output.endswith(response)
    return RewardSample(
        id=str(number),
        llm_output=llm_output,
        verification_info=verification_info or "",
        prompt=llm_output.removesuffix(response) if known and response else None,
        response=response,
    )


def _scores(table: pa.Table) -> list[float | None]:
    """Return the server's scores in a table; None for a failed sample, even if it has a constant instead of a score."""
    scores = table["score"].to_pylist()
    nothing = [None] * len(scores)
    outcomes = table["outcome"].to_pylist() if "outcome" in table.column_names else nothing
    components = table["components"].to_pylist() if "components" in table.column_names else nothing
    return [
        _server_part(score, parts)
        if outcome in ("scored", None) and score is not None and math.isfinite(score)
        else None
        for score, outcome, parts in zip(scores, outcomes, components, strict=True)
    ]


def _server_part(score: float, components: str | None) -> float:
    """Return the server's part of a score, without a reward model's score and the overlong penalty."""
    parts = json.loads(components) if components else {}
    return parts.get("reward_api", score - parts.get("overlong_penalty", 0.0))


def _difference(table: pa.Table, index: int, before: float, after: float) -> Difference:
    file = table["file"][index].as_py()
    row = index - table["file"].index(file).as_py()
    text = table["response" if "response" in table.column_names else "llm_output"][index].as_py() or ""
    return Difference(file, row, before, after, text)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _step(file: Path) -> int:
    return int(file.stem) if file.stem.isdecimal() else -1
