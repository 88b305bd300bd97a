"""The watchdog: it raises when nothing moves, names who waits where, and leaves everything else alone."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path

import pytest

from iiverl_core import activity
from iiverl_core.cluster.heartbeats import Heartbeats, send_heartbeats
from iiverl_core.cluster.runtime import ProcessReport
from iiverl_core.controller import train
from iiverl_core.controller.watchdog import StallError, Watchdog, WorkerStalledError
from iiverl_core.telemetry import Progress

TIMEOUT_S = 0.5


@pytest.fixture
def progress() -> Progress:
    return Progress(3, stream=StringIO())


@pytest.fixture
def watchdog(tmp_path: Path, progress: Progress) -> Watchdog:
    return Watchdog(TIMEOUT_S, tmp_path, progress)


@contextmanager
def background(advance: Callable[[], None]) -> Iterator[None]:
    """Call a function all the time."""
    over = threading.Event()

    def work() -> None:
        while not over.wait(TIMEOUT_S / 10):
            advance()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def wait_for_nothing(seconds: float) -> None:
    threading.Event().wait(seconds)


def test_a_wait_without_progress_is_interrupted_and_located(
    watchdog: Watchdog, progress: Progress, tmp_path: Path
) -> None:
    began = time.monotonic()
    with (
        pytest.raises(
            StallError, match=r"stall_timeout.*the phase 'scoring' .*MainThread in wait_for_nothing"
        ) as raised,
        watchdog.watching(),
        progress.phase("scoring"),
    ):
        wait_for_nothing(30)
    assert time.monotonic() - began < 15
    (file,) = (tmp_path / "stalls").iterdir()
    assert str(file) in str(raised.value)
    assert "in wait_for_nothing" in file.read_text()


@pytest.mark.parametrize("moving", ["here", "in another process", "at a prompt"])
def test_what_moves_is_left_alone(watchdog: Watchdog, monkeypatch: pytest.MonkeyPatch, moving: str) -> None:
    count = 0

    def advance() -> None:
        nonlocal count
        count += 1

    watchdog.reports = lambda: [ProcessReport("worker 0", "process 1", "update", 9.0, count, age_s=0.0)]
    if moving == "at a prompt":
        monkeypatch.setattr(Progress, "reading_input", property(lambda _: True))
    with (
        background(
            {"here": activity.advance, "in another process": advance, "at a prompt": lambda: None}[moving]
        ),
        watchdog.watching(),
    ):
        wait_for_nothing(4 * TIMEOUT_S)


def test_workers_in_a_call_and_silent_ones_are_named_and_may_be_replaced(
    watchdog: Watchdog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("iiverl_core.controller.watchdog.START_S", 2.0)
    began = time.monotonic()
    watchdog.reports = lambda: [
        ProcessReport("worker 0", "process 11 on here", "update", 65.0, 4, "in all_reduce", age_s=0.0),
        ProcessReport("worker 1", "process 12 on there", "update", 3.0, 4, "", age_s=61.0),
        ProcessReport("worker 2"),
        ProcessReport("worker 3", "process 14 on there", None, 0.0, 4, "", age_s=0.0),
    ]
    with pytest.raises(WorkerStalledError) as raised, watchdog.watching():
        wait_for_nothing(30)
    assert time.monotonic() - began > 2.0  # longer than without worker 2, which has not reported yet
    message = str(raised.value)
    assert "worker 1 (process 12 on there) does not answer since 1m01s, last in update" in message
    assert "worker 2 does not answer" in message
    assert "worker 0 (process 11 on here) is in update since 1m05s" in message
    assert "worker 3" not in message
    (file,) = (tmp_path / "stalls").iterdir()
    assert "in all_reduce" in file.read_text()


def test_no_timeout_means_no_watching(tmp_path: Path, progress: Progress) -> None:
    threads = threading.active_count()
    with Watchdog(0, tmp_path, progress).watching():
        assert threading.active_count() == threads


def test_heartbeats_tell_call_count_and_stacks() -> None:
    heartbeats = Heartbeats("localhost", interval_s=0.05)
    address = heartbeats.expect("worker 7")
    assert heartbeats.read() == [ProcessReport("worker 7")]
    with activity.call("update"):
        send_heartbeats(address)
        deadline = time.monotonic() + 20
        while not (report := heartbeats.read()[0]).stacks and time.monotonic() < deadline:
            time.sleep(0.05)
    assert (report.label, report.call) == ("worker 7", "update")
    assert "test_heartbeats_tell_call_count_and_stacks" in report.stacks
    activity.advance()
    while (later := heartbeats.read()[0]).count == report.count and time.monotonic() < deadline:
        time.sleep(0.05)
    assert later.count > report.count
    assert later.age_s is not None and later.age_s < 10
    heartbeats.forget(address)
    assert heartbeats.read() == []


def test_a_reward_function_that_never_returns_ends_the_run(quickstart, tmp_path: Path) -> None:
    file = tmp_path / "endless.py"
    file.write_text(
        "import threading\n\n\n"
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    threading.Event().wait()\n"
    )
    loaded = quickstart(
        f"custom_reward_function.path={file}", "custom_reward_function.workers=0", "trainer.stall_timeout=3"
    )
    with pytest.raises(
        StallError,
        match=r"nothing has moved for 3s.*phase 'scoring'.*iiverl-rewards in compute_score, .*endless\.py:5",
    ):
        train(loaded)
