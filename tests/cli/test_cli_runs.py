"""`iiverl runs`: a line per run, and the same as JSON."""

import json
import os
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from iiverl_cli.main import app
from iiverl_core.checkpoints import write
from iiverl_core.telemetry import RunRecorder


def iiverl(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def metrics(folder: Path, *rewards: float | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [{"step": step, "critic/score/mean": reward} for step, reward in enumerate(rewards, start=1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def save(folder: Path, step: int, score: float) -> None:
    with write(folder, step, metrics={"val/score": score}) as files:
        (files / "actor").mkdir()
        (files / "actor" / "weights").write_bytes(b"w")


def test_runs_are_listed_with_state_progress_and_checkpoints(tmp_path: Path) -> None:
    good = tmp_path / "math" / "good"
    with RunRecorder(good, "good", total_steps=40, best_metric="val/score"):
        metrics(good, 0.25, 0.5)
        for step, score in ((1, 0.75), (2, 0.5)):
            save(good, step, score)
    with pytest.raises(ValueError), RunRecorder(tmp_path / "math" / "bad", "bad"):
        raise ValueError
    metrics(tmp_path / "old", None)
    os.utime(tmp_path / "old" / "metrics.jsonl", (time.time() - 7330,) * 2)
    result = iiverl("runs", str(tmp_path))
    assert result.exit_code == 0, result.output
    heading, _, *rows = result.output.splitlines()
    assert heading.split() == ["run", "state", "step", "reward", "age", "latest", "best"]
    cells = {row.split()[0]: row.split()[1:] for row in rows}
    assert cells["math/good"] == ["ended", "2/40", "0.500", cells["math/good"][3], "2", "1", "(0.750)"]
    assert cells["math/bad"] == ["failed", "(1)", "-", "-", cells["math/bad"][4], "-", "-"]
    assert cells["math/bad"][4].endswith("s")
    assert cells["old"] == ["unknown", "1", "-", "2h02m", "-", "-"]
    assert list(cells)[-1] == "old"  # the longest silent last


def test_a_table_is_as_wide_as_a_terminal_whatever_the_names(tmp_path: Path) -> None:
    long = tmp_path / ("project-" * 12) / ("experiment-" * 9)
    with RunRecorder(long, "long", total_steps=1_000_000, best_metric="val/score"):
        metrics(long, 0.5)
        save(long, 999_999, -123.456)
    result = iiverl("runs", str(tmp_path))
    assert max(map(len, result.output.splitlines())) <= 100
    assert "experiment-experiment-  ended" in result.output


def test_runs_as_json(tmp_path: Path) -> None:
    with RunRecorder(tmp_path, "one", best_metric="val/score"):
        metrics(tmp_path, 0.5)
        save(tmp_path, 1, 0.75)
        (running,) = json.loads(iiverl("runs", str(tmp_path), "--json").output)
        assert running["state"] == "running"
    (run,) = json.loads(iiverl("runs", str(tmp_path), "--json").output)
    assert 0 <= run.pop("age") < 60
    assert run == {
        "folder": ".", "state": "ended", "step": 1, "total_steps": None, "reward": 0.5, "exit_code": 0,
        "checkpoint": 1, "best": 1, "best_metric": "val/score", "best_value": 0.75,
    }  # fmt: skip


def test_a_folder_without_runs_says_so_and_one_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert iiverl("runs", str(tmp_path)).output == f"there are no runs below {tmp_path}\n"
    assert json.loads(iiverl("runs", str(tmp_path), "--json").output) == []
    assert iiverl("runs", str(tmp_path / "nowhere")).exit_code == 2
