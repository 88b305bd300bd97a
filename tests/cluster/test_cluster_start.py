"""Ray starts beside other work of the driver, for as long as a run needs it, whoever waits for it."""

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest
import ray

from iiverl_core.cluster import ray_connection, ray_start
from iiverl_core.cluster.ray_start import RayStart, start_in_background
from iiverl_core.config import Loaded
from iiverl_core.controller import train
from iiverl_core.errors import DataError, IIVerlError

Make = Callable[..., Loaded]


def ray_processes() -> list[psutil.Process]:
    return [each for each in psutil.Process().children(recursive=True) if "ray" in " ".join(each.cmdline())]


def ray_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "iiverl-ray"]


@pytest.mark.slow
@pytest.mark.alone
def test_ray_lives_until_it_is_closed(quickstart: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    init = "ray_kwargs.ray_init"
    run = quickstart(f"{init}.num_cpus=3", f"+{init}.runtime_env.env_vars.OF_THE_RUN=7", runtime="ray").run
    start = start_in_background(run)
    assert start is not None
    start.wait()
    time.sleep(1)  # the kernel would end them with the thread that started them
    processes = ray_processes()
    assert any("raylet" in process.name() for process in processes)
    assert ray.get(ray.put(7)) == 7  # from another thread than the one that started it
    assert start_in_background(run) is None  # it is up
    assert ray.cluster_resources()["CPU"] == 3
    assert ray.get(ray.remote(os.getenv).remote("OF_THE_RUN")) == "7"
    start.close()
    start.close()
    assert not ray.is_initialized() and not ray_threads()
    assert not psutil.wait_procs(processes, timeout=30)[1]


@pytest.mark.slow
@pytest.mark.alone
def test_a_run_that_fails_meanwhile_leaves_nothing(quickstart: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(run: object) -> None:
        assert ray_threads()
        raise DataError("no prompt is short enough")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(sys.modules["iiverl_core.controller.train"], "make_plan", fail)
    with pytest.raises(DataError, match="short enough"):
        train(quickstart(runtime="ray"))
    assert not ray.is_initialized() and not ray_threads() and not ray_processes()


@pytest.mark.parametrize(
    ("address", "cpus", "variables"),
    [
        (None, 9, {"MINE": "1", "ON": "true"}),
        ("10.0.0.1:6379", None, {"MINE": "1", "ON": "true", "NCCL_DEBUG": "INFO"}),
    ],
)
def test_how_ray_is_started(
    quickstart: Make,
    monkeypatch: pytest.MonkeyPatch,
    address: str | None,
    cpus: int | None,
    variables: dict[str, str],
) -> None:
    """CPUs are counted on this machine alone; workers elsewhere get the forwarded variables as well."""
    asked: dict[str, Any] = {}

    def init(**options: object) -> None:
        asked.update(options)
        raise RuntimeError("no")

    for name in os.environ:
        if name.startswith(ray_connection.FORWARDED):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("RAY_ADDRESS", address) if address else monkeypatch.delenv(
        "RAY_ADDRESS", raising=False
    )
    monkeypatch.setattr(ray_connection, "_check_cluster", lambda named: None)
    monkeypatch.setattr(ray_connection.ray, "init", init)
    keys = (
        "ray_kwargs.ray_init.num_cpus=9",
        "ray_init.runtime_env.env_vars={MINE: 1, ON: true}",
    )  # an older name
    start = RayStart(quickstart(*keys, runtime="ray").run)
    with pytest.raises(IIVerlError):
        start.wait()
    start.close()
    assert (asked["num_cpus"], asked["runtime_env"]["env_vars"]) == (cpus, variables)


def test_who_waits_gets_the_error(quickstart: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**options: object) -> None:
        raise RuntimeError("The current node timed out during startup.")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray_connection.ray, "init", init)
    monkeypatch.setattr(ray_start, "stop_ray", lambda: pytest.fail("Ray was not started"))
    start = RayStart(quickstart(runtime="ray").run)
    with pytest.raises(IIVerlError, match="did not start on this machine: The current node"):
        start.wait()
    start.close()
    assert not ray_threads()


def test_a_run_in_one_process_starts_no_ray(quickstart: Make) -> None:
    assert start_in_background(quickstart(runtime="local").run) is None
