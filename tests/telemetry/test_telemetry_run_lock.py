"""A run's folder belongs to one run."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from iiverl_core.errors import ConfigError, IIVerlError
from iiverl_core.telemetry import RunLock, RunRecorder
from iiverl_core.telemetry.run_lock import LOCK_FILE
from iiverl_core.telemetry.run_record import RUN_FILE, process_start

HERE = {"pid": os.getpid(), "host": socket.gethostname(), "process_started": process_start(os.getpid())}
ELSEWHERE = {"pid": 123, "host": "elsewhere", "process_started": 1}


@pytest.fixture(params=["flock", "no flock"])
def flock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """A file system with and without locks; whether it has them."""
    if request.param == "no flock":

        def unsupported(*_: object) -> None:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        monkeypatch.setattr(fcntl, "flock", unsupported)
    yield request.param == "flock"


def test_a_folder_is_held_by_one_run_at_a_time(tmp_path: Path, flock: bool) -> None:
    said: list[str] = []
    folder = tmp_path / "new" / "run"
    with RunLock(folder, said.append):
        owner = f"process {os.getpid()} on {socket.gethostname()}"
        for _ in range(2):  # a refused run does not release it
            with pytest.raises(IIVerlError, match=rf"run is in use by another run, {owner}\. Wait"):
                RunLock(folder, said.append).__enter__()
    assert not (tmp_path / "new").exists()  # nothing was written to it
    with RunLock(folder, said.append):
        (folder / "metrics.jsonl").touch()
    assert [path.name for path in folder.iterdir()] == ["metrics.jsonl"]
    assert said == []


@pytest.mark.parametrize(
    "left",
    [json.dumps({**HERE, "process_started": 1}), json.dumps(ELSEWHERE), "", "{", "[]"],
    ids=["this host", "another host", "empty", "cut off", "no object"],
)
def test_the_lock_of_a_killed_run_is_taken_and_reported(tmp_path: Path, left: str, flock: bool) -> None:
    path = tmp_path / LOCK_FILE
    path.write_text(left)
    os.utime(path, (0, 0))
    said: list[str] = []
    with RunLock(tmp_path, said.append):
        assert json.loads(path.read_text()) == HERE
    assert len(said) == left.count("pid")
    assert all("taken over from process" in line for line in said)


def test_without_locks_the_heartbeat_of_a_run_on_another_machine_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with RunRecorder(tmp_path, "run"):
        record = json.loads((tmp_path / RUN_FILE).read_text())
    record |= ELSEWHERE | {"ended": None, "exit_code": None}
    path = tmp_path / LOCK_FILE
    path.write_text(json.dumps(ELSEWHERE))
    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.raises(IIVerlError, match="in use by another run, process 123 on elsewhere"):
        RunLock(tmp_path, print).__enter__()  # it has just started
    os.utime(path, (0, 0))
    for heartbeat in (time.time(), 0.0):
        (tmp_path / RUN_FILE).write_text(json.dumps(record | {"heartbeat": heartbeat}))
        if heartbeat:
            with pytest.raises(IIVerlError, match="in use by another run"):
                RunLock(tmp_path, print).__enter__()
    with RunLock(tmp_path, print):
        pass


def test_a_process_that_a_killed_run_had_forked_does_not_hold_its_folder(tmp_path: Path) -> None:
    code = (
        "import os, sys, time; from pathlib import Path; from iiverl_core.telemetry import RunLock\n"
        "with RunLock(Path(sys.argv[1]), print):\n"
        "    child = os.fork()\n"
        "    print(child, flush=True) if child else None\n"
        "    time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        try:
            with pytest.raises(IIVerlError, match=f"process {process.pid} on"):
                RunLock(tmp_path, print).__enter__()
            process.kill()
            process.wait()
            said: list[str] = []
            with (
                RunLock(tmp_path, said.append),
                pytest.raises(IIVerlError, match=f"process {os.getpid()} on"),
            ):
                RunLock(tmp_path, print).__enter__()
            assert len(said) == 1 and f"process {process.pid}" in said[0]
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_folder_that_cannot_be_made_is_an_error_of_the_configuration() -> None:
    with pytest.raises(ConfigError, match="default_local_dir: /proc/no/such/folder cannot be written"):
        RunLock(Path("/proc/no/such/folder"), print).__enter__()
