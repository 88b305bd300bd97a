"""The memory of a training step under FSDP is what `iiverl plan` counts."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from fsdp.test_fsdp_checkpoints import loss
from iiverl_core.cluster.model_runner import model_spec
from iiverl_core.config import RunConfig, build, run_config
from iiverl_core.memory import find_facts, head, plan_memory
from iiverl_core.samples import TokenSequence
from iiverl_core.training.batching import make_micro_batch
from iiverl_fsdp.backend import FSDPBackend
from storages import Storages

LENGTH = 2048


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 60 million parameters."""
    config = LlamaConfig(
        vocab_size=65_536,
        hidden_size=384,
        intermediate_size=1_024,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
    )
    path = tmp_path_factory.mktemp("model")
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    return path


def run_of(path: Path, response: int, checkpointing: bool) -> RunConfig:
    precision = {"param_dtype": "fp32", "reduce_dtype": "fp32"}
    actor = {
        "fsdp_config": {"model_dtype": "fp32", "mixed_precision": precision},
        "ppo_micro_batch_size_per_gpu": 1,
        "ppo_mini_batch_size": 1,
    }
    model = {
        "path": str(path),
        "lora_rank": 16,
        "enable_gradient_checkpointing": checkpointing,
    }
    values = {
        "data": {
            "train_batch_size": 1,
            "max_prompt_length": LENGTH - response,
            "max_response_length": response,
        },
        "algorithm": {"adv_estimator": "grpo"},
        "actor_rollout_ref": {"model": model, "actor": actor, "rollout": {"n": 2}},
        "trainer": {"n_gpus_per_node": 1},
    }
    return run_config(build(values, "fsdp"))


def peak(run: RunConfig, response: int) -> int:
    """The most bytes of tensors in a step of the actor with a micro-batch of one sequence."""
    device = torch.device("cpu")
    backend = FSDPBackend(model_spec(run.roles["actor"], device))
    ids = np.random.default_rng(0).integers(0, 1000, LENGTH)
    sequence = TokenSequence.single_turn(ids[:-response], ids[-response:], np.zeros(response))
    with Storages(*backend._model.parameters()) as storages:
        batch = make_micro_batch([sequence], {"targets": [np.ones(response)]}, [1.0], device=device)
        backend.forward_backward([batch], loss, entropy=True, entropy_gradient=False)
        backend.step(1e-5)
    return storages.most


# With many responses the head is at work when most memory is taken, with few a layer is.
@pytest.mark.slow
@pytest.mark.parametrize("response", [512, 16])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_a_step_of_adapters_takes_what_plan_counts(
    one_rank, model_path: Path, monkeypatch, response: int, checkpointing: bool
) -> None:
    monkeypatch.setattr(head, "CPU_TILE", head.DEVICE_TILE)
    run = run_of(model_path, response, checkpointing)
    plan = plan_memory(run, find_facts(run), 2**40)
    (actor,) = [each for each in plan.roles if each.role == "actor"]
    assert actor.update is not None and bool(actor.update.head) == (response > 100)
    measured = peak(run, response)
    assert actor.most == pytest.approx(measured, rel=0.1)
