"""The quickstart's model and data, and configurations of short runs on them."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from iiverl_core.config import Loaded, load

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart"
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def load_script(path: Path) -> Any:
    """Import a script that is no module of a package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def differences() -> Callable[[Path, Path, int], list[str]]:
    """What is not equal to the last bit in two runs: metrics without times, samples, and checkpoints, the last among them."""
    script = load_script(BENCHMARKS / "survival.py")

    def differences(one: Path, other: Path, last: int) -> list[str]:
        assert all((folder / f"global_step_{last}" / "actor").is_dir() for folder in (one, other))
        return script.differences(one, other)

    return differences


def make_inputs(example: Path, folder: Path) -> Path:
    """Let the `make_inputs.py` of an example write its data and its model to a folder, and return that."""
    script = load_script(example / "make_inputs.py")
    script.make_data(folder)
    script.make_model(folder / "model")
    return folder


@pytest.fixture(scope="session")
def quickstart_inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what `make_inputs.py` writes."""
    return make_inputs(QUICKSTART, tmp_path_factory.mktemp("inputs"))


def short_run(inputs: Path, folder: Path, *more: str, runtime: str = "local") -> list[str]:
    """Overrides that shorten the quickstart and let it write to `folder`, with more behind them."""
    return [
        f"data.train_files={inputs}/train.jsonl",
        f"data.val_files={inputs}/val.jsonl",
        f"actor_rollout_ref.model.path={inputs}/model",
        f"custom_reward_function.path={QUICKSTART}/reward.py",
        f"trainer.default_local_dir={folder}",
        f"trainer.rollout_data_dir={folder}/samples",
        f"trainer.runtime={runtime}",
        f"trainer.n_gpus_per_node={2 if runtime == 'ray' else 1}",
        "trainer.total_training_steps=3",
        "trainer.val_before_train=false",
        "trainer.test_freq=-1",
        "trainer.save_freq=-1",
        "trainer.logger=[jsonl]",
        "data.train_batch_size=4",
        "actor_rollout_ref.actor.ppo_mini_batch_size=4",
        "actor_rollout_ref.rollout.n=4",
        *more,
    ]


@pytest.fixture
def quickstart_overrides(quickstart_inputs: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Make overrides that shorten the quickstart and let it write below `tmp_path`, with more behind them."""

    def make(*more: str, runtime: str = "local", folder: str = "run") -> list[str]:
        return short_run(quickstart_inputs, tmp_path / folder, *more, runtime=runtime)

    return make


@pytest.fixture
def quickstart(quickstart_overrides: Callable[..., list[str]]) -> Callable[..., Loaded]:
    """Make a configuration: the quickstart's with `quickstart_overrides`."""

    def make(*more: str, runtime: str = "local", folder: str = "run") -> Loaded:
        loaded = load(
            QUICKSTART / "quickstart.yaml", quickstart_overrides(*more, runtime=runtime, folder=folder)
        )
        assert not loaded.obstacles, loaded.obstacles
        return loaded

    return make
