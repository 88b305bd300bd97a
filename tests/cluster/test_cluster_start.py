"""Ray runs for as long as a run needs it, and is started as the configuration says."""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import psutil
import pytest
import ray

from iiverl_core.cluster import ray_connection, ray_start
from iiverl_core.cluster.ray_start import ray_for
from iiverl_core.config import Loaded
from iiverl_core.controller import train
from iiverl_core.errors import DataError, IIVerlError

Make = Callable[..., Loaded]


def ray_processes() -> list[psutil.Process]:
    return [each for each in psutil.Process().children(recursive=True) if "ray" in " ".join(each.cmdline())]


@pytest.mark.slow
@pytest.mark.alone
def test_ray_lives_until_the_block_ends(quickstart: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    run = quickstart(runtime="ray").run
    before = signal.getsignal(signal.SIGTERM)
    with ray_for(run):
        processes = ray_processes()
        assert any("raylet" in process.name() for process in processes)
        with ray_for(run):  # it is up, and stays so
            pass
        assert ray.get(ray.put(7)) == 7
        assert {"iiverl_core.cluster.worker", "transformers"} <= sys.modules.keys()
        assert signal.getsignal(signal.SIGTERM) is before
    assert not ray.is_initialized()
    assert not psutil.wait_procs(processes, timeout=30)[1]


@pytest.mark.slow
@pytest.mark.alone
def test_a_run_that_fails_before_its_workers_leaves_nothing(
    quickstart: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(run: object) -> None:
        assert ray.is_initialized()
        raise DataError("no prompt is short enough")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(sys.modules["iiverl_core.controller.train"], "make_plan", fail)
    with pytest.raises(DataError, match="short enough"):
        train(quickstart(runtime="ray"))
    assert not ray.is_initialized() and not ray_processes()


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
    with pytest.raises(IIVerlError), ray_for(quickstart(*keys, runtime="ray").run):
        pass
    assert (asked["num_cpus"], asked["runtime_env"]["env_vars"]) == (cpus, variables)


def test_ray_that_does_not_start_is_not_stopped(quickstart: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**options: object) -> None:
        raise RuntimeError("The current node timed out during startup.")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray_connection.ray, "init", init)
    monkeypatch.setattr(ray_start, "stop_ray", lambda: pytest.fail("Ray was not started"))
    run = quickstart(runtime="ray").run
    with pytest.raises(IIVerlError, match="did not start on this machine: The current node"), ray_for(run):
        pass


def test_a_run_in_one_process_starts_no_ray(quickstart: Make) -> None:
    with ray_for(quickstart(runtime="local").run):
        assert not ray.is_initialized()
