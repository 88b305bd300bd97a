"""A run goes on from a checkpoint of another backend: with its weights, and an optimizer that starts again."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from iiverl_core.config import Loaded
from iiverl_core.controller import train

pytestmark = pytest.mark.megatron

PPO = (
    "algorithm.adv_estimator=gae",
    "critic.ppo_mini_batch_size=4",
    "critic.ppo_max_token_len_per_gpu=4096",
    "actor_rollout_ref.actor.checkpoint.save_contents=[model,extra]",
    "trainer.save_freq=1",
    "trainer.max_actor_ckpt_to_keep=10",
)
MEGATRON = (
    "actor_rollout_ref.actor.strategy=megatron",
    "actor_rollout_ref.actor.megatron.dtype=fp32",
    "actor_rollout_ref.actor.megatron.tensor_model_parallel_size=1",
)


def test_another_backend_takes_over_the_weights(
    quickstart: Callable[..., Loaded],
    quickstart_inputs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Losses before an update depend on the weights of actor and critic alone."""

    def run(folder: str, steps: int, *more: str) -> dict[int, dict[str, float]]:
        model, end = f"critic.model.path={quickstart_inputs}/model", f"trainer.total_training_steps={steps}"
        train(quickstart(*PPO, model, end, *more, folder=folder))
        lines = (tmp_path / folder / "metrics.jsonl").read_text().splitlines()
        return {record["step"]: record for record in map(json.loads, lines)}

    fsdp = run("fsdp", 2)
    megatron = run("megatron", 3, *MEGATRON, f"trainer.resume_mode={tmp_path}/fsdp/global_step_1")
    back = run("back", 3, f"trainer.resume_mode={tmp_path}/megatron/global_step_2")
    for step, found, expected in ((2, megatron[2], fsdp[2]), (3, back[3], megatron[3])):
        assert found["step"] == expected["step"] == step
        for name in ("critic/vf_loss", "actor/entropy_loss", "critic/score/mean", "response_length/mean"):
            assert found[name] == pytest.approx(expected[name], rel=1e-5)
    told = capsys.readouterr().out
    assert "warning: the checkpoint is of fsdp: megatron takes over its weights" in told
    assert "warning: the checkpoint is of megatron: fsdp takes over its weights" in told
    assert not list(tmp_path.glob("*/.global_step_*"))
