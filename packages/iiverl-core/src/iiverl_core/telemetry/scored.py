"""What a reward server was sent and what it answered, as parquet: `{save_dir}/{train,val}/{step}.parquet`.

The columns `llm_output`, `verification_info`, `score`, and `id` and `data_source` where the dataset has them, are those
of II-VERL; the others say more.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from iiverl_core.samples import Rollout, Split
from iiverl_core.telemetry.samples import to_json, utf8, write_parquet
from iiverl_reward_client import Failed, Outcome, Scored

COLUMNS = [
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


def write_scored(folder: Path, split: Split, step: int, rollouts: Sequence[Rollout], column: str) -> Path:
    """Write a step's rollouts; `column` is where the dataset has its verification info.

    The step is the training step, so a resumed run overwrites its own steps and nothing else. `outcome` is `scored` or
    the kind of the failure, whose reason is in `detail` and whose tries are in `attempts`; `seconds` is how long a score
    took.
    """
    rows = [_row(rollout, column) for rollout in rollouts]
    absent = {name for name in ("id", "data_source") if all(row[name] is None for row in rows)}
    schema = pa.schema([each for each in COLUMNS if each[0] not in absent])
    path = folder / split / f"{step}.parquet"
    write_parquet(path, pa.Table.from_pylist(rows, schema=schema))
    return path


def _row(rollout: Rollout, column: str) -> dict[str, Any]:
    prompt = rollout.prompt
    identity = prompt.columns.get("id")
    return {
        "id": None if identity is None else str(identity),
        "data_source": prompt.data_source or None,
        "llm_output": utf8(prompt.text + rollout.raw_text),
        "verification_info": _as_text(prompt.columns.get(column)),
        "response": utf8(rollout.raw_text),
        **_outcome(rollout.outcome),
        "group": rollout.id.group,
        "member": rollout.id.member,
        "weights_version": rollout.weights_version,
    }


def _outcome(outcome: Outcome | None) -> dict[str, Any]:
    """Describe an outcome, a constant that took the place of a score included."""
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


def _as_text(value: Any) -> str | None:
    return value if value is None else utf8(value) if isinstance(value, str) else to_json(value)
