"""`iiverl report`: one HTML file from the folders of runs."""

import json
import threading
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner, Result

from iiverl_cli.main import app
from iiverl_cli.report import distinct_names
from iiverl_core.telemetry.html_report import ReportedRun, ReportServer


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


def test_a_served_report_has_new_steps_as_they_come(tmp_path: Path) -> None:
    folder = run(tmp_path / "run")
    with ReportServer(("127.0.0.1", 0), [ReportedRun("run", folder)]) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        page, version = httpx.get(f"{address}/").text, httpx.get(f"{address}/version").text
        assert f'"version":"{version}"' in page and '"steps":[1,2,3]' in page
        assert httpx.get(f"{address}/").text == page
        with (folder / "metrics.jsonl").open("a") as metrics:
            metrics.write('{"step": 4, "critic/score/mean": 1}\n')
        assert httpx.get(f"{address}/version").text != version
        assert '"steps":[1,2,3,4]' in httpx.get(f"{address}/").text
        assert httpx.get(f"{address}/metrics.jsonl").status_code == 404
        taken = iiverl("report", str(folder), "--serve", "--port", str(server.server_port))
        assert taken.exit_code == 2 and "Address already in use" in taken.output
        server.shutdown()


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
