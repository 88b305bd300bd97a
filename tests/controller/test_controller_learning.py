"""Every algorithm learns: a short version of `benchmarks/learning.py`."""

from collections.abc import Callable
from pathlib import Path

import pytest

from iiverl_core.config import Loaded
from iiverl_core.controller import train
from quickstart_fixtures import BENCHMARKS, load_script

LEARNT_ELSEWHERE = "GRPO"  # by docs/getting-started.md, which a test runs
LEARNING = load_script(BENCHMARKS / "learning.py")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LEARNING.ALGORITHMS if name != LEARNT_ELSEWHERE])
def test_the_reward_at_least_doubles(
    quickstart: Callable[..., Loaded], quickstart_inputs: Path, tmp_path: Path, name: str
) -> None:
    train(
        quickstart(
            *LEARNING.overrides(name, quickstart_inputs, tmp_path / "run", seed=1, steps=40),
            "data.train_batch_size=16",
            "actor_rollout_ref.actor.ppo_mini_batch_size=16",
            "actor_rollout_ref.rollout.n=16",
        )
    )
    first, last = LEARNING.ends(tmp_path / "run")
    assert last > 2 * first
