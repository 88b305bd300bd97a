import json
import math
import random
import shlex
import sys
from collections.abc import Sequence
from io import BytesIO, TextIOWrapper
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iiverl_core.telemetry.curve import draw_text, moving_average, nice_ticks
from iiverl_core.telemetry.report import first_and_last, report


def run(folder: Path, rewards: Sequence[float | None]) -> None:
    lines = [
        {"step": i, "time": 0.0, "critic/score/mean": r, "timing_s/step": 0.5}
        for i, r in enumerate(rewards, 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def told(folder: Path, experiment: str = "sorting", **options) -> list[str]:
    lines: list[str] = []
    report(folder, experiment, log=lines.append, **options)
    return "\n".join(lines).splitlines()


def fact(lines: list[str], name: str) -> str:
    (line,) = [line for line in lines if line.startswith(f"  {name} ")]
    return line.removeprefix(f"  {name}").strip()


def test_a_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(Path(sys.executable).absolute().parent))
    folder, samples = Path("run"), Path("run/samples")
    for path in (folder, samples, folder / "tensorboard"):
        path.mkdir()
    for step in (9, 100):
        (samples / f"{step}.parquet").touch()
    run(folder, [0.1] * 10 + [0.3] * 80 + [0.4] * 10)
    lines = told(folder, total_steps=100, samples=samples)
    assert lines[0].strip() == "sorting: mean reward"
    assert max(map(len, lines[:18])) == 80
    assert "\x1b" not in "".join(lines)
    assert "sorting: 100 steps in 50s" in lines
    assert fact(lines, "reward") == "0.100 -> 0.400, x4.0 (first and last 10 steps)"
    assert fact(lines, "metrics") == "run/metrics.jsonl"
    assert fact(lines, "curve") == "run/reward.png"
    assert fact(lines, "tensorboard") == "tensorboard --logdir run/tensorboard"
    assert fact(lines, "samples") == "run/samples/STEP.parquet"
    assert lines[-2].startswith("next: ")
    assert lines[-1].startswith(
        """  python -c 'import pandas; print(pandas.read_parquet("run/samples/100.parquet")["""
    )
    assert (folder / "reward.png").read_bytes().startswith(b"\x89PNG")


def test_commands_that_the_shell_does_not_know_are_named_by_their_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PATH", "")
    (tmp_path / "tensorboard").mkdir()
    run(tmp_path, [0.1, 0.2])
    command = fact(told(tmp_path), "tensorboard").split(" --logdir")[0]
    assert (Path.cwd() / command).exists() and "/" in command


def test_samples_without_a_score_are_told(tmp_path: Path):
    lines = [{"step": i, "critic/score/mean": 0.5, "reward/failed": 3.0} for i in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert fact(told(tmp_path), "failed").startswith("6 samples had no score")


def test_a_validation_before_training_is_told_as_such(tmp_path: Path):
    lines = [{"step": 0, "val/test_score/x": 0.1, "val/failed": 0.0}, {"step": 1, "critic/score/mean": 0.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert fact(told(tmp_path), "validation") == "0.100 (x, before training)"


def test_a_run_that_failed_leaves_the_last_word_to_the_error(tmp_path: Path):
    run(tmp_path, [0.2, 0.3])
    assert not [line for line in told(tmp_path, ended_well=False) if line.startswith("next: ")]


def test_an_interrupted_run_says_so(tmp_path: Path):
    run(tmp_path, [0.2, 0.1, 0.4])
    lines = told(tmp_path, total_steps=50, next_line="try again")
    assert "sorting: stopped after 3 of 50 steps, in 2s" in lines
    assert fact(lines, "reward") == "0.200 -> 0.400, x2.0 (first and last step)"
    assert lines[-1] == "next: try again"


def test_a_checkpoint_is_named_and_its_model_can_be_written_to(tmp_path: Path):
    run(tmp_path, [0.2, 0.3])
    checkpoint = tmp_path / "global_step_2"
    checkpoint.mkdir()
    lines = told(tmp_path, checkpoint=checkpoint)
    assert fact(lines, "checkpoint") == str(checkpoint)
    assert lines[-1].startswith("next: ") and "pipeline" not in lines[-1]
    (checkpoint / "actor" / "huggingface").mkdir(parents=True)
    *_, last = told(tmp_path, checkpoint=checkpoint)
    _, option, code = shlex.split(last)
    assert option == "-c" and f'pipeline("text-generation", "{checkpoint}/actor/huggingface")' in code
    compile(code, "next", "exec")


def test_a_run_of_one_step_has_no_curve(tmp_path: Path):
    run(tmp_path, [0.2])
    lines = told(tmp_path)
    assert lines[0] == "sorting: 1 step in 0s"
    assert fact(lines, "reward") == "0.200"
    assert not (tmp_path / "reward.png").exists()


def test_a_run_without_rewards(tmp_path: Path):
    run(tmp_path, [None, None])
    lines = told(tmp_path)
    assert lines[0] == "sorting: 2 steps in 1s"
    assert "no sample was scored" in fact(lines, "reward")


def test_a_run_that_did_nothing(tmp_path: Path):
    lines = told(tmp_path / "nowhere", total_steps=5, samples=tmp_path / "none")
    assert lines[0] == "sorting: no training step was finished"
    assert lines[1].startswith("next: ")
    assert len(lines) == 2


def test_steps_that_were_not_scored_are_left_out(tmp_path: Path):
    run(tmp_path, [0.2, None, 0.6, None])
    assert fact(told(tmp_path), "reward") == "0.200 -> 0.600, x3.0 (first and last step)"


@pytest.mark.parametrize("rewards", [[0.0, 0.5], [-1.0, 0.5], [0.5, -1.0]])
def test_no_ratio_where_it_means_nothing(tmp_path: Path, rewards: list[float]):
    run(tmp_path, list(rewards))
    assert "x" not in fact(told(tmp_path), "reward")


def test_validation_scores_by_source(tmp_path: Path):
    records = [
        {"step": 0, "val/test_score/a/b": 0.1, "val/test_score/c": 0.5},
        {"step": 1, "critic/score/mean": 0.5},
        {"step": 1, "val/test_score/a/b": 0.3},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    lines = [line.split(maxsplit=1)[1] for line in told(tmp_path) if line.startswith("  validation")]
    assert lines == ["0.100 -> 0.300 (a/b)", "0.500 (c)"]


def test_a_run_that_only_validated(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "val/test_score/a": 0.1}\n')
    lines = told(tmp_path)
    assert lines[0] == "sorting: no training step was finished"
    assert fact(lines, "validation") == "0.100 (a)"
    assert not any(line.startswith("  reward") for line in lines)


def test_an_encoding_without_the_characters_of_the_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run(tmp_path, [0.1, 0.2])
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", TextIOWrapper(BytesIO(), encoding="ascii"))
        lines = told(tmp_path)
    assert lines[0] == "sorting: 2 steps in 1s"
    assert "".join(lines).isascii()


def test_a_picture_that_cannot_be_saved_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    run(tmp_path, [0.1, 0.2])
    (tmp_path / "reward.png").mkdir()
    assert "sorting: 2 steps in 1s" in told(tmp_path)
    assert "reward.png" in caplog.text


@pytest.mark.parametrize("experiment", ["a $x_1^$ name", "n" * 200, ""])
def test_any_name_can_be_a_title(tmp_path: Path, experiment: str):
    run(tmp_path, [0.1, 0.2])
    lines = told(tmp_path, experiment)
    assert max(map(len, lines[:18])) == 80
    assert (tmp_path / "reward.png").stat().st_size > 1000


def test_the_curve_rises_where_rewards_rise():
    noise = random.Random(0)
    values = [1 / (1 + math.exp(-(i - 50) / 8)) + noise.gauss(0, 0.02) for i in range(100)]
    rows = draw_text(range(1, 101), values, "t", colour=False).splitlines()
    canvas = [row.replace("┤", "│", 1).split("│")[1] for row in rows if "│" in row]
    columns = list(zip(*(row.ljust(75) for row in canvas), strict=True))
    heights = [next((i for i, cell in enumerate(c) if "⠀" < cell <= "⣿"), None) for c in columns]
    drawn = [h for h in heights if h is not None]
    assert len(drawn) > 60, rows
    assert drawn[0] > 9
    assert drawn[-1] < 4
    assert sum(b > a for a, b in pairwise(drawn)) <= 3  # rows count from the top


@pytest.mark.parametrize("values", [[0.0] * 5, [1e-9, 2e-9], [-5.0, 5e6], [0.5, 0.5 + 1e-12]])
def test_curves_of_any_size(values: list[float]):
    rows = draw_text(range(len(values)), values, "t", colour=False).splitlines()
    assert len(rows) == 18


def test_colour_only_when_asked():
    assert "\x1b[38" in draw_text([1, 2], [0.1, 0.2], "t", colour=True)
    assert "\x1b" not in draw_text([1, 2], [0.1, 0.2], "t", colour=False)


def test_moving_average():
    assert moving_average([1, 2, 6, 4], 1) == [1, 2, 6, 4]
    assert moving_average([1, 2, 6, 4], 3) == [1.5, 3, 4, 5]


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=60), st.integers(0, 10).map(lambda k: 2 * k + 1))
def test_a_moving_average_stays_between_the_extremes(values: list[float], window: int):
    averaged = moving_average(values, window)
    assert len(averaged) == len(values)
    assert min(values) - 1e-6 <= min(averaged)
    assert max(averaged) <= max(values) + 1e-6


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(3, 8))
def test_ticks_are_within_and_evenly_spaced(low: float, span: float, about: int):
    ticks = nice_ticks(low, low + span, about)
    assert 1 <= len(ticks) <= 2 * about
    slack = span * 1e-6 + 1e-9
    assert low - slack <= ticks[0]
    assert ticks[-1] <= low + span + slack
    gaps = [b - a for a, b in pairwise(ticks)]
    assert all(gap == pytest.approx(gaps[0], abs=span * 1e-4) for gap in gaps)


def test_first_and_last_tenth():
    assert first_and_last([1.0]) == (1.0, 1.0, 1)
    assert first_and_last([float(i) for i in range(25)]) == (0.5, 23.5, 2)
