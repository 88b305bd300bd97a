"""Two worker processes under Ray: the same run as without Ray, and what happens when one of them fails."""

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from iiverl_core.cluster.messages import WeightSync
from iiverl_core.cluster.runtime import WorkerError
from iiverl_core.cluster.worker import Worker
from iiverl_core.config import Loaded
from iiverl_core.controller import train
from iiverl_core.errors import ConfigError
from iiverl_core.rollout import RolloutRequest
from iiverl_core.samples import Prompt, SampleId

Make = Callable[..., Loaded]
SYNC = WeightSync(1)
pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.usefixtures("ray_is_up")]


def history(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def group(quickstart: Make):
    from iiverl_core.cluster.ray_group import RayGroup

    group = RayGroup(quickstart(runtime="ray").run)
    yield group
    group.close()


def test_two_processes_learn_what_one_learns(quickstart: Make, tmp_path: Path) -> None:
    steps = "trainer.total_training_steps=3"
    train(quickstart(steps, "trainer.val_before_train=true", folder="one"))
    train(quickstart(steps, "trainer.val_before_train=true", runtime="ray", folder="two"))
    one, two = (history(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two) == 4
    for left, right in zip(one, two, strict=True):
        for name in ("val/test_score/echo", "critic/score/mean", "actor/grad_norm", "actor/entropy_loss"):
            if name in left:
                assert left[name] == pytest.approx(right[name], rel=1e-3)
    assert two[1]["global_seqlen/mean"] == pytest.approx(one[1]["global_seqlen/mean"] / 2)


def test_kl_and_several_updates_work_over_two_processes(quickstart: Make, tmp_path: Path) -> None:
    options = (
        "actor_rollout_ref.actor.use_kl_loss=true",
        "algorithm.use_kl_in_reward=true",
        "actor_rollout_ref.actor.ppo_mini_batch_size=2",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=3",
    )
    train(quickstart(*options, folder="one"))
    train(quickstart(*options, runtime="ray", folder="two"))
    one, two = (history(tmp_path / name) for name in ("one", "two"))
    for left, right in zip(one[:2], two[:2], strict=True):
        for name in ("critic/kl", "actor/kl_loss", "actor/ppo_kl", "actor/grad_norm"):
            assert left[name] == pytest.approx(right[name], rel=1e-2, abs=1e-6)


def test_workers_know_where_they_are(group) -> None:
    assert [info.rank for info in group.infos] == [0, 1]
    assert [info.parallel_ranks["actor"].data_rank for info in group.infos] == [0, 1]
    assert len({info.pid for info in group.infos} | {os.getpid()}) == 3


def test_what_a_worker_raises_comes_with_its_traceback_and_name(group) -> None:
    started = time.monotonic()
    with pytest.raises(WorkerError) as caught:
        # Rank 0 waits for rank 1 in a collective call that rank 1 never makes.
        group.run(Worker.update_rollout_weights, [(SYNC,), ("too", "many", "arguments")])
    assert time.monotonic() - started < 15
    message = str(caught.value)
    assert f"worker 1 (process {group.infos[1].pid} on" in message
    assert "TypeError" in message and "update_rollout_weights" in message


def test_a_killed_worker_is_named(group) -> None:
    os.kill(group.infos[0].pid, signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(WorkerError, match=f"worker 0 \\(process {group.infos[0].pid} on .* died"):
        group.run(Worker.update_rollout_weights, [(SYNC,), (SYNC,)])
    assert time.monotonic() - started < 15


def test_a_group_can_be_started_again_after_a_death(group, quickstart: Make) -> None:
    from ray.util import placement_group_table

    from iiverl_core.cluster.ray_group import RayGroup

    processes = [psutil.Process(info.pid) for info in group.infos]
    processes[1].kill()
    with pytest.raises(WorkerError, match=r"worker 1 .* died"):
        group.run(Worker.update_rollout_weights, [(SYNC,), (SYNC,)])
    group.close()
    group.close()
    assert not psutil.wait_procs(processes, timeout=30)[1]
    again = RayGroup(quickstart(runtime="ray").run)
    try:
        assert not {info.pid for info in again.infos} & {process.pid for process in processes}
        received = again.run(Worker.update_rollout_weights, [(SYNC,), (SYNC,)])
        assert received[0] == received[1] and received[0].nbytes > 0
    finally:
        again.close()
    assert {each["state"] for each in placement_group_table().values()} == {"REMOVED"}


def test_a_worker_killed_while_generating_is_named(group, quickstart: Make) -> None:
    group.run(Worker.update_rollout_weights, [(WeightSync(0),), (WeightSync(0),)])
    prompt = Prompt(row=0, ids=(1, 2), text="")
    many = [RolloutRequest(SampleId("train", 1, i // 4, i % 4), prompt, i) for i in range(80_000)]
    stream = group.stream(Worker.generate, [(many[:8], "train"), (many, "train")])
    next(stream)
    os.kill(group.infos[1].pid, signal.SIGKILL)
    with pytest.raises(WorkerError, match=r"worker 1 .* died in generate"):
        for _ in stream:
            pass


def test_a_model_that_cannot_be_read_is_told_without_a_traceback(quickstart: Make, tmp_path: Path) -> None:
    run = quickstart("trainer.total_training_steps=1", runtime="ray").run
    model = run.actor.model.model_copy(update={"path": str(tmp_path / "nothing-here")})
    run = replace(run, roles={"actor": replace(run.actor, model=model)})
    from iiverl_core.cluster.ray_group import RayGroup

    with pytest.raises(ConfigError, match="nothing-here"):
        RayGroup(run)


def test_more_devices_than_there_are(quickstart: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from iiverl_core.cluster import ray_group, ray_placement

    run, lines = quickstart(runtime="ray").run, list[str]()

    def start(**trainer: Any) -> None:
        changed = run.trainer.model_copy(update=trainer)
        ray_group.RayGroup(replace(run, trainer=changed), log=lines.append)

    with pytest.raises(ConfigError, match="asks for 2 GPUs, and the Ray cluster has 0"):
        start(device="cuda")
    assert not lines
    monkeypatch.setattr(ray_placement, "REPORT_S", 0.4)
    with pytest.raises(ConfigError, match=r"could not place 1 × .*CPU.*64.* within 1 s"):
        start(n_gpus_per_node=64, placement_timeout=1)
    assert "CPU': 64" in lines[0] and "it has {'CPU': 5.0}" in lines[0]
    with pytest.raises(ConfigError, match=r"could not place 1 × .*GPU': 2"):  # machines might have been added
        start(device="cuda", placement_timeout=1)


def test_devices_that_come_free_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.util.placement_group import remove_placement_group

    from iiverl_core.cluster import ray_placement

    monkeypatch.setattr(ray_placement, "REPORT_S", 0.2)
    options: dict[str, Any] = {"strategy": "PACK", "timeout_s": 60}
    other = ray_placement.reserve([4], "cpu", log=lambda line: None, **options)
    lines = list[str]()

    def log(line: str) -> None:
        lines.append(line)
        if len(lines) == 2:
            remove_placement_group(other)

    remove_placement_group(ray_placement.reserve([3], "cpu", log=log, **options))
    assert len(lines) >= 2
