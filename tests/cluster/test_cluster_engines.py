"""Engines in processes of their own: the same samples as beside the trainer, also when they are killed."""

import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from iiverl_core.cluster.runtime import WorkerError
from iiverl_core.config import Loaded
from iiverl_core.controller import train
from iiverl_core.controller.observer import StepRecord
from iiverl_core.controller.replay import load_run, replay
from iiverl_core.controller.trainer import Trainer

Make = Callable[..., Loaded]
pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.usefixtures("ray_is_up")]

LONG = (
    "actor_rollout_ref.rollout.ignore_eos=true",
    "data.max_response_length=48",
    "actor_rollout_ref.rollout.micro_batch_size=1",  # so that answers come one prompt after the other
    "data.train_batch_size=8",
    "actor_rollout_ref.actor.ppo_mini_batch_size=8",
)


def history(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def answers(folder: Path, step: int) -> list[tuple]:
    rows = pq.read_table(folder / "samples" / f"{step}.parquet").to_pylist()
    return [(row["group"], row["member"], row["response"], row["weights_version"]) for row in rows]


def killed(engines, rank: int) -> None:
    process = psutil.Process(engines.infos[rank].pid)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(10)


def test_engines_elsewhere_give_the_same_samples_as_engines_here(quickstart: Make, tmp_path: Path) -> None:
    train(quickstart("trainer.total_training_steps=2", runtime="ray", folder="here"))
    train(
        quickstart(
            "trainer.total_training_steps=2", "trainer.rollout_devices=1", runtime="ray", folder="there"
        )
    )
    here, there = (history(tmp_path / name) for name in ("here", "there"))
    assert answers(tmp_path / "here", 1) == answers(tmp_path / "there", 1)
    for name in ("critic/score/mean", "actor/grad_norm"):
        assert here[0][name] == pytest.approx(there[0][name], rel=1e-5)
    assert {row[3] for row in answers(tmp_path / "there", 2)} == {1}


def test_a_killed_engine_comes_back_and_owes_nothing(
    quickstart: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Engines are killed between any two arrivals of samples; the run has the samples of one without a death."""
    from iiverl_core.cluster import ray_engines

    options = (*LONG, "trainer.rollout_devices=2", "trainer.total_training_steps=4")
    train(quickstart(*options, runtime="ray", folder="undisturbed"))

    chance = random.Random(0)
    generate = ray_engines.RayEngines.generate
    deaths = []

    def disturbed(self, questions, sampling):
        at, victim = chance.randrange(3), chance.randrange(2)
        for i, samples in enumerate(generate(self, questions, sampling)):
            if i == at and len(deaths) < 3:
                deaths.append(victim)
                killed(self, victim)
            yield samples

    monkeypatch.setattr(ray_engines.RayEngines, "generate", disturbed)
    train(quickstart(*options, runtime="ray", folder="disturbed"))
    assert len(deaths) == 3
    assert capfd.readouterr().out.count("died; it is started again") == 3
    for step in (1, 2, 3, 4):
        rows = answers(tmp_path / "disturbed", step)
        assert len({row[:2] for row in rows}) == len(rows) == 32
        assert {row[3] for row in rows} == {step - 1}
    assert answers(tmp_path / "disturbed", 1) == answers(tmp_path / "undisturbed", 1)


def test_an_engine_killed_while_weights_arrive_has_them_when_it_is_back(
    quickstart: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from iiverl_core.cluster import ray_engines

    update = ray_engines.RayEngines.update_weights
    deaths = []

    def disturbed(self, version: int, *, verify: bool) -> Any:
        if version == 1 and not deaths:
            deaths.append(0)
            killed(self, 0)
        return update(self, version, verify=verify)

    monkeypatch.setattr(ray_engines.RayEngines, "update_weights", disturbed)
    train(quickstart("trainer.rollout_devices=1", runtime="ray"))
    assert deaths
    for step in (1, 2, 3):
        assert {row[3] for row in answers(tmp_path / "run", step)} == {step - 1}


BESIDE = (
    "trainer.rollout_devices=1",
    "trainer.n_gpus_per_node=1",
    "trainer.max_staleness=1",
    "trainer.total_training_steps=6",
)


def test_a_run_that_generates_beside_training_repeats_bit_by_bit(
    quickstart: Make, differences: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when it is killed while it trains, with the next step's rollouts ready, and resumed."""
    saving = ("trainer.save_freq=2", "trainer.resume_mode=auto", "trainer.max_actor_ckpt_to_keep=2")
    options = (*BESIDE, *saving, "trainer.test_freq=3")
    train(quickstart(*options, runtime="ray", folder="whole"))
    for step in range(1, 7):
        assert {row[3] for row in answers(tmp_path / "whole", step)} == {max(0, step - 2)}
    assert [record["staleness/max"] for record in history(tmp_path / "whole")] == [0, 1, 1, 1, 1, 1]
    assert (tmp_path / "whole" / "global_step_4" / "rollouts.json").exists()

    class Killed(BaseException):
        """The end of the process."""

    update = Trainer.update

    def stop(self: Trainer, *arguments: Any) -> None:
        if any(isinstance(each, StepRecord) and each.step == 6 for each in arguments):
            raise Killed
        update(self, *arguments)

    loaded = quickstart(*options, runtime="ray", folder="killed")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Trainer, "update", stop)
        train(loaded)
    train(loaded)
    assert differences(tmp_path / "killed", tmp_path / "whole", 6) == []


def test_an_engine_that_dies_again_and_again_is_retired_and_the_last_one_ends_the_run(
    quickstart: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Beside training, with partial rollouts: the engine that is left writes everything, each response once."""
    from iiverl_core.cluster import ray_engines

    monkeypatch.setattr(ray_engines, "MAX_RESTARTS", 1)
    generate = ray_engines.RayEngines.generate
    asked: list[set[int]] = []

    def disturbed(self, requests, sampling):
        asked.append({number for number, each in requests.items() if each})
        if 1 in self.numbers:
            killed(self, 1)
        elif min(each.id.step for part in requests.values() for each in part) > 3:
            killed(self, 0)
        yield from generate(self, requests, sampling)

    monkeypatch.setattr(ray_engines.RayEngines, "generate", disturbed)
    options = (
        "trainer.rollout_devices=2",
        "trainer.max_staleness=2",
        "actor_rollout_ref.rollout.partial=true",
        "actor_rollout_ref.rollout.min_engines=1",
        "trainer.val_before_train=false",
    )
    with pytest.raises(
        WorkerError, match=r"rollout engine 0 .* died 2 times in a row.*\n?.*gpu_memory_utilization"
    ):
        train(quickstart(*BESIDE, *LONG, *options, runtime="ray"))
    assert asked[0] == {0, 1} and 1 in asked[1] and {tuple(each) for each in asked[2:]} == {(0,)}
    told = "it is retired, and its unfinished responses are regenerated by the 1 engine that is left"
    assert capfd.readouterr().out.count(told) == 1
    assert history(tmp_path / "run")[-1]["perf/engines"] == 1
    for step in (1, 2, 3):
        rows = answers(tmp_path / "run", step)
        assert sorted(row[:2] for row in rows) == [(g, m) for g in range(8) for m in range(4)]
        assert {row[3] for row in rows} <= set(range(max(0, step - 3), step))


def test_an_engine_that_dies_beside_training_writes_the_rest_with_newer_weights(
    quickstart: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Engines are interrupted for the weights after each step, and several steps' responses are written side by side.

    A mini-batch is trained as soon as it is there; in which order they were is recorded, and a replay follows it.
    """
    from iiverl_core.cluster import ray_engines

    generate = ray_engines.RayEngines.generate
    calls: list[set[int]] = []  # the steps of each

    def disturbed(self, questions, sampling):
        calls.append({each.id.step for part in questions.values() for each in part})
        number = len(calls)
        for samples in generate(self, questions, sampling):
            yield samples
            if number in (2, 4):
                killed(self, 0)
                number = 0

    monkeypatch.setattr(ray_engines.RayEngines, "generate", disturbed)
    options = (
        "trainer.max_staleness=2",
        "actor_rollout_ref.rollout.partial=true",
        "trainer.val_before_train=false",
        "actor_rollout_ref.actor.ppo_mini_batch_size=2",
        "actor_rollout_ref.actor.ppo_epochs=2",
        "actor_rollout_ref.actor.shuffle=true",
        "actor_rollout_ref.actor.use_kl_loss=true",
    )
    loaded = quickstart(*BESIDE, *LONG, *options, runtime="ray")
    train(loaded)
    assert len(calls) > 5
    assert sum(record["perf/early_mini_batches"] for record in history(tmp_path / "run")) > 0
    assert max(map(len, calls)) > 1
    several = [record["staleness/several_versions"] for record in history(tmp_path / "run")]
    assert max(several) > 0
    told = {name for record in history(tmp_path / "run") for name in record if "kl/staleness" in name}
    assert {"rollout/kl/staleness_0", "rollout/kl/staleness_1"} <= told
    for step in range(1, 7):
        rows = answers(tmp_path / "run", step)
        assert len({row[:2] for row in rows}) == len(rows) == 32
        assert {row[3] for row in rows} <= set(range(max(0, step - 3), step))
    recorded = load_run(tmp_path / "run")
    for replayed in replay(tmp_path / "run", recorded, 6, first=1):
        assert replayed.recorded is not None and not replayed.different, replayed.different
    parts = [
        json.loads((tmp_path / "run" / "samples" / f"{step}.json").read_text())[0]["parts"]
        for step in range(1, 7)
    ]
    assert all(sorted(group for part in each for group in part) == list(range(8)) for each in parts)
    assert {len(each) for each in parts} == {4}


VLLM = (
    "actor_rollout_ref.rollout.name=vllm",
    "actor_rollout_ref.rollout.verify_weights=true",
    "actor_rollout_ref.rollout.max_num_seqs=64",
    "data.train_batch_size=16",
    "actor_rollout_ref.actor.ppo_mini_batch_size=16",
    "actor_rollout_ref.rollout.n=16",
)


@pytest.mark.vllm
def test_grpo_learns_with_vllm_in_a_process_of_its_own(quickstart: Make, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    apart = ("actor_rollout_ref.rollout.tensor_model_parallel_size=1", "trainer.rollout_devices=1")
    train(quickstart(*VLLM, *apart, "trainer.total_training_steps=30", runtime="ray"))
    records = history(tmp_path / "run")
    scores = [record["critic/score/mean"] for record in records]
    assert sum(scores[-5:]) > 2 * sum(scores[:5])
    assert all(record["rollout/kl"] < 1e-5 for record in records)
