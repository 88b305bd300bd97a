import json
import math
import time
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from iiverl_core.telemetry.history import JsonLines, read_history


def write(folder: Path, *records: tuple[int, dict[str, float]]) -> None:
    tracker = JsonLines(folder)
    for step, metrics in records:
        tracker.log(metrics, step)
    tracker.close()


def rows(folder: Path, name: str = "a") -> list[tuple[int, float]]:
    return [(record["step"], record[name]) for record in read_history(folder)]


def test_a_line_is_strict_json_and_is_there_at_once(tmp_path: Path):
    tracker = JsonLines(tmp_path / "new" / "folder")
    before = time.time()
    tracker.log({"a/b": 0.5, "n": 3, "bad": math.nan, "worse": -math.inf}, 7)
    (line,) = (tmp_path / "new" / "folder" / "metrics.jsonl").read_text().splitlines()
    record = json.loads(line, parse_constant=lambda constant: 1 / 0)
    assert list(record) == ["step", "time", "a/b", "n", "bad", "worse"]
    assert before <= record.pop("time") <= time.time()
    assert record == {"step": 7, "a/b": 0.5, "n": 3, "bad": None, "worse": None}
    tracker.close()


@settings(max_examples=30)
@given(st.dictionaries(st.text(min_size=1), st.floats(allow_nan=False, allow_infinity=False), max_size=5))
def test_what_is_written_is_read_back(tmp_path_factory, metrics: dict[str, float]):
    metrics = {name: value for name, value in metrics.items() if name not in ("step", "time")}
    metrics = {name: value for name, value in metrics.items() if name.isprintable()}
    folder = tmp_path_factory.mktemp("run")
    write(folder, (3, metrics))
    (record,) = read_history(folder)
    assert {name: record[name] for name in metrics} == metrics


def test_lines_of_a_step_are_joined(tmp_path: Path):
    write(tmp_path, (1, {"a": 1.0}), (1, {"val": 0.5}), (2, {"a": 2.0}))
    first, second = read_history(tmp_path)
    assert (first["a"], first["val"], second["a"]) == (1.0, 0.5, 2.0)


def test_a_resumed_run_supersedes_what_it_repeats(tmp_path: Path):
    write(tmp_path, *((step, {"a": float(step)}) for step in range(1, 6)))
    write(tmp_path, (4, {"a": 40.0}), (5, {"a": 50.0}), (6, {"a": 60.0}))
    assert rows(tmp_path) == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0), (5, 50.0), (6, 60.0)]


def test_a_run_begun_anew_in_the_same_folder_supersedes_all(tmp_path: Path):
    write(tmp_path, *((step, {"a": float(step)}) for step in range(1, 6)))
    write(tmp_path, (1, {"a": 10.0}), (2, {"a": 20.0}))
    assert rows(tmp_path) == [(1, 10.0), (2, 20.0)]


def test_half_a_line_is_passed_over_and_spoils_no_other(tmp_path: Path):
    write(tmp_path, (1, {"a": 1.0}))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"step": 2, "a": 0.\xc3')
    assert rows(tmp_path) == [(1, 1.0)]
    write(tmp_path, (2, {"a": 2.0}))
    assert rows(tmp_path) == [(1, 1.0), (2, 2.0)]


def test_lines_that_are_no_records_are_passed_over(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('[1]\n{"a": 1}\n\n{"step": "x"}\n{"step": 3, "a": 3.0}\n')
    assert rows(tmp_path) == [(3, 3.0)]


def test_no_file_is_no_history(tmp_path: Path):
    assert read_history(tmp_path) == []
