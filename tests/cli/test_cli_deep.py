"""`iiverl validate --deep` finds what shows only when code is imported and every row is read."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from iiverl_cli.main import app

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart" / "quickstart.yaml"
ROW = {"prompt": [{"role": "user", "content": "cafe"}], "data_source": "echo", "ground_truth": "cafe"}


@pytest.fixture
def validate(quickstart_overrides: Callable[..., list[str]]) -> Callable[..., Result]:
    def run(*overrides: str, deep: bool = True) -> Result:
        options = ["--deep"] * deep
        return CliRunner().invoke(
            app, ["validate", str(QUICKSTART), *options, *quickstart_overrides(*overrides)]
        )

    return run


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"data.train_files={path}"


def test_what_can_run_passes_and_writes_nothing(validate: Callable[..., Result], tmp_path: Path) -> None:
    result = validate()
    assert result.exit_code == 0, result.output
    assert "4032 prompts" in result.stderr
    assert not (tmp_path / "run").exists()


def test_code_that_fails_to_import(validate: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text("import no_such_module\ndef compute_score(**_): return 0\n")
    function = f"custom_reward_function.path={tmp_path}/reward.py"
    assert validate(function, deep=False).exit_code == 0
    result = validate(function)
    assert result.exit_code == 2
    assert "reward.py, line 1, in <module>: import no_such_module" in result.stderr


@pytest.mark.parametrize(
    ("last", "message"),
    [
        ({**ROW, "prompt": [{"role": "user", "content": "cafe" * 9}]}, "row 120 (the first is 0): the prompt has"),
        ({**ROW, "prompt": 7}, "row 120 (the first is 0): the prompt is of type int"),
    ],
)  # fmt: skip
def test_a_late_row(validate: Callable[..., Result], tmp_path: Path, last: dict, message: str) -> None:
    data = write(tmp_path / "train.jsonl", [ROW] * 120 + [last])
    assert validate(data, deep=False).exit_code == 0
    result = validate(data)
    assert result.exit_code == 2
    assert message in result.stderr


def test_no_ground_truth_in_any_row(validate: Callable[..., Result], tmp_path: Path) -> None:
    data = write(tmp_path / "train.jsonl", [{**ROW, "ground_truth": None}] * 120)
    shallow = validate(data, deep=False)
    assert shallow.exit_code == 0
    assert "warning[C914]: data.train_files" in shallow.stderr
    result = validate(data)
    assert result.exit_code == 2
    assert f"error: no row of {tmp_path}/train.jsonl has a ground truth" in result.stderr


def test_a_reward_function_is_checked_but_not_called(validate: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "called.py").write_text(f"def compute_score(**_): open({str(tmp_path / 'called')!r}, 'w')\n")
    result = validate(f"custom_reward_function.path={tmp_path}/called.py")
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "called").exists()
    (tmp_path / "wrong.py").write_text("def score(response): return 0\ncompute_score = score\n")
    result = validate(f"custom_reward_function.path={tmp_path}/wrong.py")
    assert result.exit_code == 2
    assert "error: custom_reward_function.name: compute_score(response) in " in result.stderr
