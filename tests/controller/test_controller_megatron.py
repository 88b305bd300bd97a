"""GRPO and PPO learn under Megatron, split by tensor and by pipeline; both rollout engines sample from what it trains."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from iiverl_core.config import Loaded
from iiverl_core.controller import train
from iiverl_core.controller.replay import load_run, replay

Make = Callable[..., Loaded]
pytestmark = [pytest.mark.megatron, pytest.mark.slow, pytest.mark.alone, pytest.mark.usefixtures("ray_is_up")]

ACTOR = "actor_rollout_ref.actor"
LAYOUTS = {
    "tensor": (f"{ACTOR}.megatron.tensor_model_parallel_size=2",),
    "pipeline": (
        f"{ACTOR}.megatron.tensor_model_parallel_size=1",
        f"{ACTOR}.megatron.pipeline_model_parallel_size=2",
        "actor_rollout_ref.model.use_remove_padding=true",
    ),
}
ENGINES = {
    "hf": (),
    "vllm": (
        "actor_rollout_ref.rollout.name=vllm",
        "actor_rollout_ref.rollout.tensor_model_parallel_size=2",
        "actor_rollout_ref.rollout.verify_weights=true",
        "actor_rollout_ref.rollout.max_num_seqs=64",
    ),
}
GRPO = ("data.train_batch_size=16", f"{ACTOR}.ppo_mini_batch_size=16", "actor_rollout_ref.rollout.n=16")
ALGORITHMS = {
    "grpo": GRPO,
    "ppo": (
        "data.train_batch_size=32",
        f"{ACTOR}.ppo_mini_batch_size=32",
        "actor_rollout_ref.rollout.n=16",
        "algorithm.adv_estimator=gae",
        "algorithm.lam=0.95",
        "critic.optim.lr=2e-3",
        "trainer.critic_warmup=3",
    ),
}


@pytest.fixture
def trained(
    quickstart: Make, quickstart_inputs: Path, tmp_path: Path
) -> Callable[[str, str, str, int], list[dict[str, Any]]]:
    """Train with an algorithm, a layout and an engine, check that the engine samples from what is trained, return metrics."""

    def run(algorithm: str, layout: str, engine: str, steps: int) -> list[dict[str, Any]]:
        if engine == "vllm" and find_spec("vllm") is None:
            pytest.skip("vLLM is not installed")
        train(
            quickstart(
                f"{ACTOR}.strategy=megatron",
                f"{ACTOR}.megatron.dtype=fp32",
                f"critic.model.path={quickstart_inputs}/model",
                *ALGORITHMS[algorithm],
                *LAYOUTS[layout],
                *ENGINES[engine],
                f"trainer.total_training_steps={steps}",
                runtime="ray",
            )
        )
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        kl = [each["rollout/kl"] for each in records if "rollout/kl" in each]  # not before the actor's turn
        assert len(kl) >= steps - 3 and max(kl) < 1e-5
        return records

    return run


# With the test below, every pair of algorithm, layout and engine, if not all three at once.
@pytest.mark.parametrize(("algorithm", "layout"), [("grpo", "tensor"), ("ppo", "pipeline")])
def test_the_reward_doubles(trained: Callable[..., list], algorithm: str, layout: str) -> None:
    scores = [each["critic/score/mean"] for each in trained(algorithm, layout, "hf", 30)]
    assert sum(scores[-5:]) > 2 * sum(scores[:5])


@pytest.mark.vllm
@pytest.mark.parametrize(("algorithm", "layout"), [("grpo", "pipeline"), ("ppo", "tensor")])
def test_vllm_samples_from_the_policy_that_is_trained(
    trained: Callable[..., list], algorithm: str, layout: str
) -> None:
    """Which then learns as with the other engine."""
    assert trained(algorithm, layout, "vllm", 6)[-1]["actor/grad_norm"] > 0


@pytest.mark.parametrize("sync", ["merged", "adapter"])
@pytest.mark.parametrize("engine", ["hf", pytest.param("vllm", marks=pytest.mark.vllm)])
def test_engines_compute_with_adapters_what_the_trainer_does(
    quickstart: Make, tmp_path: Path, engine: str, sync: str
) -> None:
    if engine == "vllm" and find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    options = (
        f"{ACTOR}.strategy=megatron",
        f"{ACTOR}.megatron.dtype=fp32",
        f"{ACTOR}.use_kl_loss=true",
        f"{ACTOR}.optim.lr=1e-2",
        "actor_rollout_ref.model.lora_rank=4",
        "actor_rollout_ref.rollout.verify_weights=true",
        f"actor_rollout_ref.rollout.lora_sync={sync}",
        *LAYOUTS["tensor"],
        *ENGINES[engine],
    )
    train(quickstart(*options, runtime="ray"))
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 3
    assert max(record["rollout/kl"] for record in records) < 1e-5
    assert records[0]["actor/kl_loss"] == pytest.approx(0, abs=1e-9)  # of the actor without adapters
    assert records[-1]["actor/kl_loss"] > 1e-3


def test_one_process_trains_and_replays(quickstart: Make, tmp_path: Path) -> None:
    """A run in this process leaves nothing that is in the way of the next one, which computes its steps to the last bit."""
    options = (
        f"{ACTOR}.strategy=megatron",
        f"{ACTOR}.megatron.dtype=fp32",
        f"{ACTOR}.megatron.tensor_model_parallel_size=1",
        f"{ACTOR}.ppo_mini_batch_size=2",
        "trainer.total_training_steps=2",
        "trainer.save_freq=1",
        "trainer.max_actor_ckpt_to_keep=null",
    )
    train(quickstart(*options))
    folder = tmp_path / "run"
    for first, steps in ((1, [1, 2]), (2, [2])):
        replayed = replay(folder, load_run(folder), 2, first=first)
        assert [(each.step, each.different) for each in replayed] == [(step, []) for step in steps]
        assert all(each.replayed["actor/grad_norm"] for each in replayed)
