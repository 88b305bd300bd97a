"""How a run under Ray ends when it is interrupted or loses a worker: quickly, with a reason, and leaving nothing behind."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from iiverl_core.checkpoints import latest
from iiverl_core.telemetry import read_run
from quickstart_fixtures import QUICKSTART

pytestmark = [pytest.mark.slow, pytest.mark.alone]


def is_worker(process: psutil.Process) -> bool:
    try:
        return "ray::WorkerActor" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # it ended since it was listed
        return False


class Run:
    """`iiverl train-ppo` on a quickstart without end, in a process of its own."""

    def __init__(self, overrides: list[str], log: Path) -> None:
        self.log = log
        self.process = subprocess.Popen(
            [
                Path(sys.executable).with_name("iiverl"),
                "train-ppo",
                QUICKSTART / "quickstart.yaml",
                *overrides,
            ],
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.family: list[psutil.Process] = []

    def wait_for(self, text: str) -> None:
        """Wait until `text` was printed, and remember all processes that the run has by then."""
        deadline = time.monotonic() + 120
        while text not in self.log.read_text():
            if self.process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"no {text!r} in:\n{self.log.read_text()}")
            time.sleep(0.1)
        self.family = psutil.Process(self.process.pid).children(recursive=True)

    def worker(self) -> psutil.Process:
        """One of the worker processes."""
        return next(each for each in self.family if is_worker(each))

    def ends(self, within: float) -> int:
        """Wait for the end and for all of the run's processes to be gone; the exit code."""
        started = time.monotonic()
        code = self.process.wait(timeout=within)
        gone, alive = psutil.wait_procs(self.family, timeout=within - (time.monotonic() - started))
        assert not alive, alive
        assert gone
        return code


@pytest.fixture
def run(quickstart_overrides: Callable[..., list[str]], tmp_path: Path) -> Iterator[Run]:
    overrides = quickstart_overrides("trainer.total_training_steps=100000", runtime="ray")
    run = Run(overrides, tmp_path / "log")
    yield run
    if run.process.poll() is None:
        os.killpg(run.process.pid, signal.SIGKILL)
    for process in run.family:
        if process.is_running():
            process.kill()


def test_a_killed_worker_ends_the_run(run: Run) -> None:
    run.wait_for("step 3/")
    worker = run.worker()
    worker.kill()
    assert run.ends(within=15) == 1
    log = run.log.read_text()
    assert f"(process {worker.pid} on" in log
    assert "error: worker" in log and "died in" in log
    assert "stopped after" in log  # the report of what there is
    assert "Traceback" not in log


def test_an_interrupted_run_leaves_nothing_behind(run: Run) -> None:
    """SIGTERM does the same, as in tests/launch/test_launch_two_machines.py."""
    run.wait_for("step 3/")
    os.killpg(run.process.pid, signal.SIGINT)  # as Ctrl-C does
    assert run.ends(within=15) == 130
    log = run.log.read_text()
    assert "Traceback" not in log
    assert "stopped after" in log
    assert (run.log.parent / "run" / "metrics.jsonl").exists()


def test_an_interrupted_run_that_saves_finishes_its_step(
    quickstart_overrides: Callable[..., list[str]], tmp_path: Path
) -> None:
    options = ("trainer.total_training_steps=100000", "trainer.save_freq=100000")
    run = Run(quickstart_overrides(*options, runtime="ray"), tmp_path / "log")
    run.wait_for("step 3/")
    os.killpg(run.process.pid, signal.SIGINT)
    assert run.ends(within=30) == 130
    log = run.log.read_text()
    assert "finishing the current step" in log and "Traceback" not in log
    newest = latest(tmp_path / "run").checkpoint
    assert newest is not None and newest.step >= 3
    record = read_run(tmp_path / "run")
    assert record is not None and record.exit_code == 130


def test_interrupted_while_workers_start(run: Run) -> None:
    deadline = time.monotonic() + 60
    children: list[psutil.Process] = []
    while not any(map(is_worker, children)) and time.monotonic() < deadline:
        time.sleep(0.2)
        children = psutil.Process(run.process.pid).children(recursive=True)
    run.family = children
    run.process.send_signal(signal.SIGINT)
    assert run.ends(within=15) == 130


def test_a_run_whose_workers_die_and_stall_starts_again_and_ends_with_the_same_bits(
    quickstart_overrides: Callable[..., list[str]],
    differences: Callable[..., list[str]],
    tmp_path: Path,
) -> None:
    def overrides(folder: str) -> list[str]:
        saving = ("trainer.total_training_steps=24", "trainer.save_freq=5", "trainer.stall_timeout=25")
        return quickstart_overrides(*saving, runtime="ray", folder=folder)

    run = Run(overrides("killed"), tmp_path / "log")
    run.wait_for("step 12/")
    killed = run.worker()
    killed.kill()
    run.wait_for("restarting (1 of 3)")
    run.wait_for("step 18/")
    stopped = run.worker()
    stopped.suspend()  # alive, and in nobody's way but the other worker's, which waits for it
    assert run.process.wait(timeout=240) == 0
    log = run.log.read_text()
    assert f"(process {killed.pid} on" in log
    assert re.search(
        rf"nothing has moved for 25s .*worker \d \(process {stopped.pid} on .*\) does not answer", log
    )
    assert log.count("restarting (1 of 3)") == 2  # each time with a newer checkpoint
    assert re.search(r"resuming after step \d*[05] from .*/killed/global_step_\d", log)
    assert "Traceback" not in log
    undisturbed = Run(overrides("whole"), tmp_path / "whole.log")
    assert undisturbed.process.wait(timeout=120) == 0
    assert differences(tmp_path / "killed", tmp_path / "whole", 24) == []
