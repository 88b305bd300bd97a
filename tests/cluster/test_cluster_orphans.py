"""A command that is killed leaves no process behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import psutil
import pytest

from iiverl_core import orphans
from iiverl_core.orphans import Lifeline
from quickstart_fixtures import QUICKSTART

needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")


def processes_of(mark: str) -> list[int]:
    """The processes that inherited a mark in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "environ").read_bytes():
                found.append(int(process.name))
        except OSError:
            pass
    return found


def wait_until_none_is_left(mark: str, seconds: float) -> list[int]:
    deadline = time.monotonic() + seconds
    while (left := processes_of(mark)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


@needs_proc
def test_marked_processes_end_and_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iiverl_core.orphans._GRACE_S", 0.0)
    mark = f"MARK={uuid4().hex}"
    name, value = mark.split("=")
    lifeline = Lifeline()
    lifeline.end_marked(mark)
    marked = subprocess.Popen(["sleep", "300"], env={name: value}, start_new_session=True)
    # A shell with the mark, whose child has lost it, as a process that overwrites its environment with its title.
    parent = subprocess.Popen(
        ["sh", "-c", "env -i sleep 300 & echo $!; wait"],
        env={name: value, "PATH": os.environ["PATH"]},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    child = Path("/proc") / parent.stdout.readline().strip()
    other = subprocess.Popen(["sleep", "300"], env={name: value + "0"})
    time.sleep(0.5)
    assert marked.poll() is None
    lifeline.close()
    assert marked.wait(30) == -signal.SIGKILL
    assert parent.wait(30) == -signal.SIGKILL
    deadline = time.monotonic() + 30
    while child.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not child.exists()
    assert other.poll() is None
    other.kill()
    other.wait()


@needs_proc
def test_processes_whose_marked_parent_died_before_are_known() -> None:
    """Ray's processes may die with the driver, and leave behind children that have overwritten the mark."""
    mark = f"MARK={uuid4().hex}"
    name, value = mark.split("=")
    lifeline = Lifeline()
    lifeline.end_marked(mark)
    parent = subprocess.Popen(
        ["sh", "-c", "env -i sleep 300 & echo $!; wait"],
        env={name: value, "PATH": os.environ["PATH"]},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    time.sleep(2 * orphans._LOOK_BEFORE_S + 1)
    parent.kill()
    parent.wait()
    assert child.is_running()
    lifeline.close()
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


@pytest.mark.slow
@pytest.mark.alone
@needs_proc
@pytest.mark.parametrize(("number", "seconds"), [(signal.SIGKILL, 30), (signal.SIGHUP, 60)])
def test_a_killed_run_on_ray_leaves_no_process(
    quickstart_overrides: Callable[..., list[str]], tmp_path: Path, number: signal.Signals, seconds: float
) -> None:
    mark = f"MARK_OF_THE_TEST={uuid4().hex}"
    name, value = mark.split("=")
    command = [Path(sys.executable).with_name("iiverl"), "train-ppo", QUICKSTART / "quickstart.yaml"]
    overrides = quickstart_overrides("trainer.total_training_steps=100000", runtime="ray")
    with (tmp_path / "out").open("w") as out:
        run = subprocess.Popen(
            [*command, *overrides],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, name: value},
            start_new_session=True,
        )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (metrics.exists() and metrics.stat().st_size) and run.poll() is None:
        assert time.monotonic() < deadline, (tmp_path / "out").read_text()
        time.sleep(0.2)
    assert len(processes_of(mark)) > 4, (tmp_path / "out").read_text()
    run.send_signal(number)
    try:
        assert run.wait(60) == (-number if number == signal.SIGKILL else 128 + number)
        assert wait_until_none_is_left(mark, seconds) == []
    finally:
        for pid in processes_of(mark):
            os.kill(pid, signal.SIGKILL)
