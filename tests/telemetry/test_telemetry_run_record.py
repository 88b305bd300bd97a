"""`run.json`: what a run says of itself, and what can be told of one that was killed."""

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from iiverl_core.errors import ConfigError
from iiverl_core.telemetry import RUN_FILE, RunRecord, RunRecorder, read_run


def known(folder: Path) -> RunRecord:
    record = read_run(folder)
    assert record is not None
    return record


def test_a_run_says_that_it_runs_and_how_it_ended(tmp_path: Path) -> None:
    with RunRecorder(tmp_path / "run", "first", total_steps=9):
        record = known(tmp_path / "run")
        assert (record.state(), record.experiment, record.total_steps) == ("running", "first", 9)
        assert (record.pid, record.host) == (os.getpid(), socket.gethostname())
    record = known(tmp_path / "run")
    assert (record.state(), record.exit_code) == ("ended", 0)
    assert record.ended is not None and record.ended >= record.started
    assert [path.name for path in (tmp_path / "run").iterdir()] == [RUN_FILE]


@pytest.mark.parametrize(
    ("error", "code"), [(ConfigError("x"), 2), (KeyboardInterrupt(), 130), (ValueError(), 1)]
)
def test_an_error_that_ends_a_run_is_its_exit_code(tmp_path: Path, error: BaseException, code: int) -> None:
    with pytest.raises(type(error)), RunRecorder(tmp_path, "run"):
        raise error
    assert (known(tmp_path).state(), known(tmp_path).exit_code) == ("failed", code)


def test_an_end_that_is_given_counts(tmp_path: Path) -> None:
    with RunRecorder(tmp_path, "run") as recorder:
        recorder.end(143)
    assert known(tmp_path).exit_code == 143


def test_a_heartbeat_goes_on_by_itself_and_survives_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def beats_after(moment: float) -> bool:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if known(tmp_path).heartbeat > moment:
                return True
            time.sleep(0.01)
        return False

    with RunRecorder(tmp_path, "run", interval=0.01):
        assert beats_after(time.time())
        with monkeypatch.context() as patch:

            def full(*_: object, **__: object) -> None:
                raise OSError(28, "No space left on device")

            patch.setattr(Path, "write_text", full)
            time.sleep(0.1)
        assert beats_after(time.time())


def test_a_killed_run_died(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from iiverl_core.telemetry.run_record import RunRecorder\n"
        "with RunRecorder(Path(sys.argv[1]), 'run'): print('up', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == b"up\n"
            assert known(tmp_path).state() == "running"
        finally:
            process.kill()
    assert known(tmp_path).state() == "died"


def test_another_process_of_the_same_number_is_not_the_run(tmp_path: Path) -> None:
    with RunRecorder(tmp_path, "run"):
        record = known(tmp_path)
    record = replace(record, ended=None, exit_code=None)
    assert record.state() == "running"
    assert record.process_started is None or replace(record, process_started=1).state() == "died"


def test_on_another_machine_the_heartbeat_decides(tmp_path: Path) -> None:
    with RunRecorder(tmp_path, "run"):
        record = replace(known(tmp_path), host="elsewhere", pid=2**22 + 1)
    assert record.state() == "running"
    assert record.state(now=record.heartbeat + 200) == "running"
    assert record.state(now=record.heartbeat + 1000) == "died"


@pytest.mark.parametrize("content", ["", "{", "[]", json.dumps({"pid": 1}), "\x00"])
def test_a_file_that_is_not_a_record_is_no_run(tmp_path: Path, content: str) -> None:
    (tmp_path / RUN_FILE).write_text(content)
    assert read_run(tmp_path) is None
    assert read_run(tmp_path / "nowhere") is None
