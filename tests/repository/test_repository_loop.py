"""`examples/loop.py` is GRPO as the real loop has it: the same rewards, to the last digit."""

import json
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

from iiverl_core.config import Loaded
from iiverl_core.controller import train
from iiverl_core.telemetry.metrics import SCORE

LOOP = Path(__file__).parents[2] / "examples" / "loop.py"
STEPS = 6


@pytest.mark.slow
def test_the_example_gets_the_rewards_of_the_real_loop(
    quickstart: Callable[..., Loaded], quickstart_inputs: Path, tmp_path: Path
) -> None:
    rewards = runpy.run_path(str(LOOP))["main"](STEPS, inputs=quickstart_inputs)

    sizes = (
        "data.train_batch_size=32",
        "actor_rollout_ref.actor.ppo_mini_batch_size=32",
        "actor_rollout_ref.rollout.n=16",
    )
    train(quickstart(*sizes, f"trainer.total_training_steps={STEPS}"))
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rewards) == STEPS
    assert rewards == pytest.approx([metrics[SCORE] for metrics in logged], rel=1e-12)


def test_the_example_is_short_enough_to_be_read() -> None:
    assert len(LOOP.read_text().splitlines()) <= 150
