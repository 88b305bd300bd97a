"""A run that was killed and resumed ends with the same bits as one that was not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from iiverl_core.checkpoints import latest
from iiverl_core.config import Loaded
from iiverl_core.controller import train
from iiverl_core.controller.trainer import Trainer

STEPS = 6
SAVING = (f"trainer.total_training_steps={STEPS}", "trainer.save_freq=2", "trainer.resume_mode=auto")
PPO = (
    "algorithm.adv_estimator=gae",
    "critic.ppo_mini_batch_size=4",
    "critic.ppo_max_token_len_per_gpu=4096",
    "algorithm.use_kl_in_reward=true",
    "algorithm.kl_ctrl.type=adaptive",
    "algorithm.kl_ctrl.target_kl=0.001",
    "algorithm.kl_ctrl.horizon=50",
    "trainer.critic_warmup=4",
)
FILTERED = (
    "algorithm.filter_groups.enable=true",
    "algorithm.filter_groups.max_num_gen_batches=3",
    "data.gen_batch_size=4",
)
KINDS = {"grpo": (), "ppo": PPO, "dynamic sampling": FILTERED}


class Killed(BaseException):
    """Stands for the end of the process: nothing that handles errors catches it."""


def timeless(record: dict[str, Any]) -> dict[str, Any]:
    """Leave out what is a time, or a share of one."""
    return {
        name: value
        for name, value in record.items()
        if not name.startswith(("time", "timing", "perf/")) and name != "reward/hidden_fraction"
    }


def history(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps: dict[int, dict[str, Any]] = {}
    for line in lines:
        steps.setdefault(line["step"], {}).update(timeless(line))
    assert list(steps) == sorted(steps)
    return list(steps.values())


def samples(folder: Path) -> dict[str, Any]:
    return {path.name: pq.read_table(path).to_pylist() for path in (folder / "samples").glob("*.parquet")}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a model's checkpoint, weights and optimizer."""
    metadata = FileSystemReader(folder).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    state_dict_loader.load(state, checkpoint_id=folder, no_dist=True)
    return state


def assert_same_end(folder: Path, other: Path) -> None:
    assert history(folder) == history(other)
    assert samples(folder) == samples(other)
    for role in (path.name for path in (other / f"global_step_{STEPS}").iterdir() if path.is_dir()):
        found, expected = (tensors(each / f"global_step_{STEPS}" / role) for each in (folder, other))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def killed_at(step: int, monkeypatch: pytest.MonkeyPatch, loaded: Loaded) -> None:
    """Train until the actor, or before its turn the critic, is about to be updated at a step."""
    update = Trainer.update

    def stop(self: Trainer, role: Any, sequences: Any, groups: Any, record: Any) -> None:
        if record.step == step:
            raise Killed
        update(self, role, sequences, groups, record)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Trainer, "update", stop)
        train(loaded)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_ends_with_the_same_bits(
    kind: str,
    quickstart: Callable[..., Loaded],
    quickstart_inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = (*SAVING, *KINDS[kind], f"critic.model.path={quickstart_inputs}/model")
    train(quickstart(*options, folder="whole"))
    for step in (1, 3, STEPS):
        folder = f"killed-{step}"
        loaded = quickstart(*options, folder=folder)
        killed_at(step, monkeypatch, loaded)
        newest = latest(tmp_path / folder).checkpoint
        assert (newest.step if newest else 0) == (step - 1) // 2 * 2
        train(loaded)
        assert_same_end(tmp_path / folder, tmp_path / "whole")
