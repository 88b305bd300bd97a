"""A model's shape from its config.json, against transformers' own count of its parameters."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from iiverl_core.config.model_facts import find_config, positions_from, read_model_facts
from vision_models import FAMILIES, vision_config

SHAPES = Path(__file__).parents[2] / "examples" / "grpo_megatron" / "models"
TINY: dict[str, Any] = {
    "vocab_size": 37,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
EXPERTS: dict[str, Any] = {
    **TINY,
    "head_dim": 8,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**TINY),
        LlamaConfig(**TINY, attention_bias=True, mlp_bias=True, head_dim=4),
        Qwen2Config(**TINY),
        Qwen2Config(**TINY, tie_word_embeddings=True),
        Qwen3Config(**TINY, head_dim=10),
        Qwen3Config(**TINY, attention_bias=True, tie_word_embeddings=True),
        Qwen3MoeConfig(**EXPERTS),
        Qwen3MoeConfig(**EXPERTS, decoder_sparse_step=2, mlp_only_layers=[3]),
    ],
    ids=lambda config: config.model_type,
)
def test_parameters_are_those_of_the_model(config: PreTrainedConfig, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    facts = read_model_facts(str(tmp_path))
    assert facts is not None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert facts.parameters == sum(p.numel() for p in model.parameters())
    assert facts.attention_parameters == sum(
        p.numel() for p in model.model.layers[0].self_attn.parameters()
    ) - (2 * facts.head_dim if facts.qk_norm else 0)
    mlps = [type(layer.mlp).__name__ for layer in model.model.layers]
    assert facts.expert_layers == tuple(i for i, name in enumerate(mlps) if "Sparse" in name)


@pytest.mark.parametrize(
    ("name", "billions", "active"),
    [("Qwen2.5-7B-Instruct", 7.6, 7.6), ("Qwen3-32B", 32.8, 32.8), ("Qwen3-235B-A22B", 235.1, 22.2)],
)
def test_well_known_sizes(name: str, billions: float, active: float) -> None:
    facts = read_model_facts(str(SHAPES / name))
    assert facts is not None
    assert round(facts.parameters / 1e9, 1) == billions
    assert round(facts.active_parameters / 1e9, 1) == active


def test_values_are_replaced_and_nested_ones_found(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "model_type": "seeing",
                "tie_word_embeddings": True,
                "text_config": {**TINY, "model_type": "qwen2"},
            }
        )
    )
    facts = read_model_facts(str(tmp_path))
    assert facts is not None
    assert (facts.model_type, facts.tied_embeddings, facts.layers) == ("qwen2", True, 4)
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "model_type": "llama"}))
    replaced = read_model_facts(str(tmp_path), {"num_hidden_layers": 2})
    assert replaced is not None
    assert (replaced.layers, replaced.head_dim) == (2, 8)


def test_a_hub_name_is_looked_up_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    model = tmp_path / "hub" / "models--org--name"
    snapshot = model / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("abc123")
    (snapshot / "config.json").write_text(json.dumps({**TINY, "model_type": "qwen2"}))
    assert find_config("org/name") is None
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert find_config("org/name") == snapshot / "config.json"
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "other"))
    assert read_model_facts("org/name") is None


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "{", '{"n_embd": 64}', json.dumps({**TINY, "num_attention_heads": 0})]
)
def test_what_is_no_known_shape_is_none(text: str, tmp_path: Path) -> None:
    assert read_model_facts(str(tmp_path)) is None
    (tmp_path / "config.json").write_text(text)
    assert read_model_facts(str(tmp_path)) is None


@pytest.mark.parametrize("name", ["no/such", "", "a" * 5000, "nul\0byte"])
def test_what_cannot_be_a_path_is_none(name: str) -> None:
    assert find_config(name) is None


@pytest.mark.parametrize(
    ("values", "positions"),
    [
        ({"max_position_embeddings": 64}, 64),
        ({"n_positions": 1024}, 1024),
        ({}, None),
        ({"max_position_embeddings": 64, "rope_scaling": None}, 64),
        ({"max_position_embeddings": 64, "rope_scaling": {"type": "linear", "factor": 2.0}}, 128),
        ({"max_position_embeddings": 64, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, 64),
        ({"max_position_embeddings": 256, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 256),
        (
            {
                "max_position_embeddings": 64,
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
            },
            256,
        ),
        (
            {
                "max_position_embeddings": 256,
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
            },
            256,
        ),
    ],
)
def test_the_number_of_positions(values: dict, positions: int | None) -> None:
    """As vLLM derives it: scaling multiplies the positions that a model was pretrained with."""
    assert positions_from(values) == positions


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_of_a_vision_tower_are_counted(family: str, tmp_path: Path) -> None:
    config = vision_config(family)
    config.save_pretrained(tmp_path)
    facts = read_model_facts(str(tmp_path))
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    assert facts is not None
    assert facts.parameters == sum(each.numel() for each in model.parameters())
    others = {
        id(each) for part in (model.base_model.language_model, model.lm_head) for each in part.parameters()
    }
    tower = [each for each in model.parameters() if id(each) not in others]
    assert facts.vision_parameters == sum(each.numel() for each in tower)
