"""What Ray and torch are told before they are used."""

import os
import pickle
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from iiverl_core.cluster import rendezvous
from iiverl_core.cluster.process_settings import (
    DETERMINISTIC,
    configure_allocator,
    make_deterministic,
    use_idle_cores,
)
from iiverl_core.config import build, run_config


@pytest.mark.parametrize("module", ["ray_pool", "ray_group", "ray_engines"])
def test_workers_are_not_started_through_uv(module: str) -> None:
    """Ray looks at the environment once, when it is imported: it has to be set by then, whoever imports Ray first."""
    code = (
        "import os, sys\n"
        "class Watching:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'ray':\n"
        "            print(os.environ.get('RAY_ENABLE_UV_RUN_RUNTIME_ENV'), flush=True)\n"
        "            os._exit(0)\n"
        "sys.meta_path.insert(0, Watching())\n"
        f"import iiverl_core.cluster.{module}\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ENABLE_UV_RUN_RUNTIME_ENV"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0"]


@pytest.mark.parametrize(("assigned", "seen"), [([5], "5"), (["GPU-1"], "GPU-1"), ([], "0,1")])
def test_a_worker_sees_the_devices_that_ray_gave_it(
    monkeypatch: pytest.MonkeyPatch, assigned: list[int | str], seen: str
) -> None:
    """Even where the cluster has told Ray to leave the variable alone (RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES)."""
    import ray

    from iiverl_core.cluster.ray_actor import WorkerActor

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(ray, "get_gpu_ids", lambda: assigned)
    WorkerActor(pickle.dumps(object), str(Path.cwd()))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == seen


def test_an_engine_waits_for_the_memory_of_the_one_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it is enough, and no more comes; and not for ever."""
    from iiverl_core.cluster import rollout_worker

    free = iter([10, 40, 60, 90, 90, 95])
    monkeypatch.setattr(rollout_worker, "POLL_S", 0.0)
    monkeypatch.setattr(rollout_worker.torch.cuda, "mem_get_info", lambda: (next(free), 100))
    rollout_worker.await_memory(0.5)
    assert list(free) == [95]
    monkeypatch.setattr(rollout_worker.torch.cuda, "mem_get_info", lambda: (10, 100))
    rollout_worker.await_memory(0.5, seconds=0.05)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, None),
    ],
)
def test_the_allocator_is_configured_unless_the_user_did(given: dict[str, str], expected: str | None) -> None:
    with mock.patch.dict(os.environ, given, clear=True):
        configure_allocator()
        assert os.environ.get("PYTORCH_CUDA_ALLOC_CONF") == expected


def test_a_deterministic_run_asks_all_libraries_for_it() -> None:
    name = next(iter(DETERMINISTIC))
    before = torch.are_deterministic_algorithms_enabled()
    try:
        with mock.patch.dict(os.environ, {name: "own"}, clear=True):
            make_deterministic("cuda", asked=True)
            assert {each: os.environ[each] for each in DETERMINISTIC} == {**DETERMINISTIC, name: "own"}
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(before)


def test_on_a_cpu_several_threads_add_up_in_one_order() -> None:
    """The gradient of an indexed tensor, such as that of hidden states at some tokens, has the same bits each time."""
    before, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    states_TD, other_TD = torch.randn(2000, 64, requires_grad=True), torch.randn(2000, 64)
    tokens = torch.randint(0, 30, (2000,))
    try:
        torch.set_num_threads(4)
        with mock.patch.dict(os.environ, {}, clear=True):
            make_deterministic("cpu", asked=False)
            assert not os.environ
        gradients = [
            torch.autograd.grad((states_TD[tokens] * other_TD).sum(), states_TD)[0] for _ in range(20)
        ]
    finally:
        torch.use_deterministic_algorithms(before)
        torch.set_num_threads(threads)
    assert all(torch.equal(each, gradients[0]) for each in gradients)


@pytest.mark.parametrize(("offload", "threads"), [(True, [4]), (False, [])])
def test_an_optimizer_in_cpu_memory_has_its_part_of_the_cores(
    monkeypatch: pytest.MonkeyPatch, offload: bool, threads: list[int]
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(34))
    fsdp = {"optimizer_offload": offload}
    use_idle_cores(run_config(build({"actor_rollout_ref": {"actor": {"fsdp_config": fsdp}}})))
    assert asked == threads


def test_processes_wait_for_one_that_reads_a_large_model(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(rendezvous.dist, "is_initialized", lambda: False)
    monkeypatch.setattr(rendezvous.dist, "init_process_group", lambda *_, **options: given.update(options))
    monkeypatch.setattr(rendezvous.torch.cuda, "set_device", lambda device: given.update(device=device))
    rendezvous.join_process_group("tcp://host:1", 0, 2, "cuda")
    assert given["timeout"] == timedelta(hours=2)
    assert given["device"] == 0  # the only one that a process sees
