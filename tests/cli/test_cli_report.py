"""`iiverl report`: one HTML file from the folders of runs."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from iiverl_cli.main import app
from iiverl_cli.report import distinct_names


def iiverl(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def run(folder: Path) -> Path:
    folder.mkdir(parents=True)
    lines = [{"step": step, "critic/score/mean": step / 4} for step in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_run_and_others_to_compare_it_with(tmp_path: Path) -> None:
    one, two = run(tmp_path / "a" / "run"), run(tmp_path / "b" / "run")
    alone = iiverl("report", str(one))
    assert alone.exit_code == 0 and alone.output.startswith(f"{one}/report.html (")
    both = iiverl("report", str(one), str(two), "-o", str(tmp_path / "both.html"))
    assert both.exit_code == 0
    assert (
        '"name":"a/run"' in (tmp_path / "both.html").read_text()
        and '"name":"b/run"' in (tmp_path / "both.html").read_text()
    )


def test_what_is_no_run_or_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = iiverl("report", str(tmp_path / "empty"))
    assert result.exit_code == 2 and "has no metrics.jsonl" in result.output
    result = iiverl("report", str(run(tmp_path / "run")), "-o", str(tmp_path / "none" / "x.html"))
    assert result.exit_code == 2 and "cannot be written: No such file" in result.output


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["/x/run"], ["run"]),
        (["/x/run", "/y/run"], ["x/run", "y/run"]),
        (["/x/a/run", "/y/a/run", "/x/a/run"], ["x/a/run", "y/a/run"]),
    ],
)
def test_runs_are_named_as_shortly_as_tells_them_apart(folders: list[str], names: list[str]) -> None:
    assert list(distinct_names([Path(folder) for folder in folders])) == names
