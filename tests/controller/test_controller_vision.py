"""Runs of a vision-language model: they learn from images, and end with the same bits if killed and resumed."""

from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from controller.test_controller_resume import killed_at
from iiverl_core.config import Loaded, load
from iiverl_core.controller import train
from iiverl_core.telemetry import read_history
from quickstart_fixtures import make_inputs

EXAMPLE = Path(__file__).parents[2] / "examples" / "name_the_colour"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's model and data."""
    return make_inputs(EXAMPLE, tmp_path_factory.mktemp("colours"))


@pytest.fixture
def colours(inputs: Path, tmp_path: Path) -> Callable[..., Loaded]:
    """Load a short run of the example in one process, which writes below `tmp_path`."""

    def make(*more: str, folder: str) -> Loaded:
        overrides = [
            f"data.train_files={inputs}/train.parquet",
            f"data.val_files={inputs}/val.parquet",
            f"actor_rollout_ref.model.path={inputs}/model",
            f"custom_reward_function.path={EXAMPLE}/reward.py",
            "actor_rollout_ref.actor.ppo_mini_batch_size=4",
            "data.train_batch_size=4",
            f"trainer.default_local_dir={tmp_path}/{folder}",
            f"trainer.rollout_data_dir={tmp_path}/{folder}/samples",
            "trainer.runtime=local",
            "trainer.n_gpus_per_node=1",
            "trainer.total_training_steps=4",
            "trainer.val_before_train=false",
            "trainer.test_freq=-1",
            "trainer.logger=[jsonl]",
            "trainer.deterministic=true",
        ]
        return load(EXAMPLE / "name_the_colour.yaml", [*overrides, *more])

    return make


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits(
    colours: Callable[..., Loaded],
    differences: Callable[[Path, Path, int], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save = ("trainer.save_freq=2", "trainer.resume_mode=auto")
    whole, killed = (colours(*save, folder=name) for name in ("whole", "killed"))
    train(whole)
    killed_at(4, monkeypatch, killed)
    train(killed)
    assert differences(whole.run.folder, killed.run.folder, 4) == []
    for record in read_history(whole.run.folder):
        assert abs(record["rollout/kl"]) < 1e-9  # engine and trainer see the same images
    (sample, *_) = pq.read_table(whole.run.folder / "samples" / "4.parquet").to_pylist()
    assert sample["prompt"].count("<|image_pad|>") == 9
    (name,) = sample["images"]
    assert (whole.run.folder / "samples" / "images" / f"{name}.jpg").stat().st_size < 2000


@pytest.mark.slow
def test_it_learns_to_name_colours(colours: Callable[..., Loaded]) -> None:
    loaded = colours(
        "data.train_batch_size=32",
        "actor_rollout_ref.actor.ppo_mini_batch_size=32",
        "trainer.total_training_steps=60",
        "trainer.save_freq=-1",
        folder="learns",
    )
    train(loaded)
    rewards = [record["critic/score/mean"] for record in read_history(loaded.run.folder)]
    assert sum(rewards[-6:]) > 3 * sum(rewards[:6])
