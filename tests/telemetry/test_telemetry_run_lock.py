"""A run's folder belongs to one run."""

import json
import os
import socket
from pathlib import Path

import pytest

from iiverl_core.errors import IIVerlError
from iiverl_core.telemetry import RunLock
from iiverl_core.telemetry.run_lock import LOCK_FILE


def test_a_folder_is_held_by_one_run_at_a_time(tmp_path: Path) -> None:
    said: list[str] = []
    folder = tmp_path / "new" / "run"
    with RunLock(folder, said.append):
        owner = f"process {os.getpid()} on {socket.gethostname()}"
        for _ in range(2):  # a refused run does not release it
            with pytest.raises(IIVerlError, match=rf"run is in use by another run, {owner}\. Wait"):
                RunLock(folder, said.append).__enter__()
    with RunLock(folder, said.append):
        pass
    assert said == []


@pytest.mark.parametrize("left", [json.dumps({"pid": 123, "host": "elsewhere"}), "", "{", "[]"])
def test_the_lock_of_a_killed_run_is_taken_and_reported(tmp_path: Path, left: str) -> None:
    (tmp_path / LOCK_FILE).write_text(left)
    said: list[str] = []
    with RunLock(tmp_path, said.append):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert len(said) == left.count("elsewhere")
    assert all("taken over from process 123 on elsewhere" in line for line in said)
