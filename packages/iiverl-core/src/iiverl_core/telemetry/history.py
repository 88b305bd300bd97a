"""Write and read `metrics.jsonl`, a line per step, and write `generations.jsonl`, a line per logged response."""

import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

from iiverl_core.telemetry.generations import Generation

METRICS_FILE = "metrics.jsonl"
GENERATIONS_FILE = "generations.jsonl"


class JsonLines:
    """Writes `{"step": N, "time": unix seconds, name: value, …}` per line, in strict JSON: null if a value is not finite.

    A resumed run appends to the file.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._file = _open(folder / METRICS_FILE)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write a step's line and flush it."""
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        line = json.dumps({"step": step, "time": time.time(), **finite}, allow_nan=False, ensure_ascii=False)
        self._file.write(line.encode() + b"\n")
        self._file.flush()

    def log_generations(self, rows: Sequence[Generation], step: int) -> None:
        """Append the responses to `generations.jsonl`, a line `{"step": N, "row": …, "prompt": …, …}` each."""
        with _open(self._folder / GENERATIONS_FILE) as file:
            for row in rows:
                file.write(json.dumps({"step": step, **asdict(row)}, ensure_ascii=False).encode() + b"\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _open(path: Path) -> BinaryIO:
    file = path.open("ab+")
    if file.tell() and not _ends_with_newline(path):
        file.write(b"\n")  # ends the partial line of a killed run
    return file


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read() == b"\n"


def read_history(folder: Path) -> list[dict[str, Any]]:
    """Read the metrics of each step from a run's folder, ordered by step; an empty list if there are none.

    Lines of the same step are merged. A step lower than the one before it means that the run was resumed or restarted:
    earlier lines from that step on are superseded. The partial line of a killed run is skipped.
    """
    path = folder / METRICS_FILE
    history: list[dict[str, Any]] = []
    if not path.exists():
        return history
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                continue
            if history and record["step"] < history[-1]["step"]:
                history = [old for old in history if old["step"] < record["step"]]
            if history and record["step"] == history[-1]["step"]:
                history[-1] |= record
            else:
                history.append(record)
    return history


def validation_scores(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the mean validation score of each data source from the metrics of a step."""
    prefix, of_several = "val/test_score/", re.compile(r"/(mean|best|worst|maj)@\d+$")
    return {
        name.removeprefix(prefix): value
        for name, value in metrics.items()
        if name.startswith(prefix) and not of_several.search(name) and is_finite_number(value)
    }


def is_finite_number(value: Any) -> TypeGuard[float]:
    """Return whether a value of the file is a finite number; other numbers are null there."""
    return isinstance(value, int | float) and math.isfinite(value)
