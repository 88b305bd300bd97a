"""A mixture of experts, which transformers computes with joined experts, gives its weights as its checkpoints have them."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from iiverl_core.config import FSDPConfig, ModelConfig
from iiverl_core.training import ModelSpec
from iiverl_fsdp.backend import FSDPBackend


def test_weights_are_named_as_in_a_checkpoint(one_rank, tmp_path: Path) -> None:
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=24,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,  # pyright: ignore[reportCallIssue]
    )
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path)
    spec = ModelSpec(
        role="actor",
        model=ModelConfig(path=str(tmp_path), use_remove_padding=False),
        parallel=FSDPConfig(),
        device=torch.device("cpu"),
    )
    saved = load_file(tmp_path / "model.safetensors")
    backend = FSDPBackend(spec)
    given = list(backend.named_weights())
    assert sorted(name for name, _ in given) == sorted(saved)
    assert "model.layers.1.mlp.experts.3.gate_proj.weight" in saved
    assert all(torch.equal(value, saved[name]) for name, value in given)
    backend.save(tmp_path / "checkpoint")()
    read = list(FSDPBackend.saved_weights(spec, tmp_path / "checkpoint"))
    assert [name for name, _ in read] == [name for name, _ in given]
    assert all(torch.equal(value, saved[name]) for name, value in read)
