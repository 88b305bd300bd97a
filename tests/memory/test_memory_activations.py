"""Activations and the head: what autograd keeps of a layer of transformers, and how parallelism divides it."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from iiverl_core.config.model_facts import ModelFacts, read_model_facts
from iiverl_core.memory.activations import Work, activations, kept_by_a_layer
from iiverl_core.memory.head import head_memory
from iiverl_core.memory.layout import Layout

TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attn_implementation": "sdpa",
}
TOKENS = 256
WORK = Work(TOKENS, 128)
FACTS = ModelFacts("qwen2", 160, 64, 96, layers=8, heads=8, kv_heads=4, head_dim=8)
EXPERTS = replace(
    FACTS, experts=16, experts_per_token=2, expert_size=24, expert_layers=tuple(range(8)), qk_norm=True
)


def kept_by_autograd(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of all tensors that a forward pass over TOKENS tokens keeps, each storage once, without the weights."""
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.model(input_ids=torch.zeros(1, TOKENS, dtype=torch.long))
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [LlamaConfig, Qwen2Config, Qwen3Config])
def test_a_layer_keeps_what_autograd_keeps(kind: Any, dtype: torch.dtype, tmp_path) -> None:
    one, three = (kind(**TINY, num_hidden_layers=layers, head_dim=32) for layers in (1, 3))
    measured = (kept_by_autograd(three, dtype) - kept_by_autograd(one, dtype)) / 2
    one.save_pretrained(tmp_path)
    facts = read_model_facts(str(tmp_path))
    assert facts is not None
    counted = kept_by_a_layer(facts, Layout(1, sharded=True, weight_bytes=dtype.itemsize), WORK)
    assert counted == pytest.approx(measured, rel=0.01)


def test_a_layer_of_megatron_keeps_its_joint_projection_and_up_twice() -> None:
    norms, attention, mlp = 4 * 64, 3 * 64 + 3 * 32, 5 * 96
    assert kept_by_a_layer(FACTS, Layout(1), WORK) == TOKENS * ((norms + attention + mlp) * 2 + 8 * 4)
    chosen = 2 * (64 + 6 * 24)
    with_experts = (norms + attention + 64 + chosen) * 2 + 8 * 4 + 16 * 4
    assert kept_by_a_layer(EXPERTS, Layout(1), WORK) == TOKENS * with_experts


def test_experts_keep_what_autograd_keeps(tmp_path) -> None:
    experts: dict[str, Any] = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 96,
        "head_dim": 32,
    }
    one, three = (Qwen3MoeConfig(**TINY, **experts, num_hidden_layers=layers) for layers in (1, 3))
    measured = (kept_by_autograd(three, torch.float32) - kept_by_autograd(one, torch.float32)) / 2
    one.save_pretrained(tmp_path)
    facts = read_model_facts(str(tmp_path))
    assert facts is not None
    counted = kept_by_a_layer(facts, Layout(1, sharded=True, weight_bytes=4), WORK)
    assert counted == pytest.approx(measured, rel=0.1)  # which kernel runs the experts makes a difference


@pytest.mark.parametrize("facts", [FACTS, EXPERTS], ids=["dense", "experts"])
def test_sequence_parallelism_divides_what_tensor_parallelism_leaves(facts: ModelFacts) -> None:
    whole = kept_by_a_layer(facts, Layout(4), WORK)
    both = kept_by_a_layer(facts, Layout(4, tensor=4, sequence_parallel=True), WORK)
    assert both * 4 == whole
    tensor_alone = kept_by_a_layer(facts, Layout(4, tensor=4), WORK)
    between = 4 * facts.hidden_size * 2 * TOKENS
    if not facts.experts:
        assert tensor_alone == between + (whole - between) // 4
    assert kept_by_a_layer(facts, Layout(4, context=4), WORK) * 4 == whole


def test_the_first_stage_keeps_as_much_as_all_layers() -> None:
    layer = kept_by_a_layer(FACTS, Layout(4, pipeline=4), WORK)
    assert activations(FACTS, Layout(1), "first", WORK, trained=True) == 8 * layer
    assert activations(FACTS, Layout(4, pipeline=4), "first", WORK, trained=True) == 8 * layer
    assert activations(FACTS, Layout(4, pipeline=4), "last", WORK, trained=True) == 2 * layer
    # Korthikanti et al. 2022, appendix C: interleaving v chunks keeps L (1 + (p - 1) / (p v)) layers.
    interleaved = activations(FACTS, Layout(4, pipeline=4, chunks=2), "first", WORK, trained=True)
    assert interleaved == round(8 * (1 + 3 / 8) * layer)


def test_checkpointing_keeps_inputs_and_one_layer() -> None:
    layer = kept_by_a_layer(FACTS, Layout(1), WORK)
    work = replace(WORK, checkpointing=True)
    inputs = TOKENS * FACTS.hidden_size * 2
    assert activations(FACTS, Layout(1), "first", work, trained=True) == 8 * inputs + layer
    split = activations(FACTS, Layout(4, tensor=4, sequence_parallel=True), "first", work, trained=True)
    assert split == (8 * inputs + layer) // 4


def test_groups_of_layers_keep_fewer_inputs_and_exist_once_more() -> None:
    layer, inputs = kept_by_a_layer(FACTS, Layout(1), WORK), TOKENS * FACTS.hidden_size * 2
    count = partial(activations, FACTS, Layout(1), "first", trained=True)
    pairs = replace(WORK, checkpointing=True, recomputed=2)
    assert count(pairs) == 4 * inputs + 2 * layer
    assert count(replace(pairs, recomputed=100)) == inputs + 8 * layer  # all at once
    some = replace(pairs, only_first=True)
    assert count(some) == 2 * inputs + 6 * layer + layer
    assert count(replace(some, recomputed=8)) == count(replace(WORK, checkpointing=True))
    # Of each chunk of a stage, which has two layers here, one is recomputed.
    chunks = activations(
        FACTS, Layout(2, pipeline=2, chunks=2), "last", replace(some, recomputed=1), trained=True
    )
    assert chunks == 2 * inputs + 2 * layer + layer


def test_without_gradients_one_layer_is_enough() -> None:
    assert activations(FACTS, Layout(1), "first", WORK, trained=False) == kept_by_a_layer(
        FACTS, Layout(1), WORK
    )


def test_a_tile_of_logits_is_where_the_head_is() -> None:
    tile, hidden, weight = 128 * 160 * 2 * 4, 128 * 64, 160 * 64  # all logits are one tile
    count = partial(head_memory, FACTS, work=WORK)
    assert count(Layout(1), "first", trained=False) == tile + hidden * 2
    assert count(Layout(1), "first", trained=True) == tile + hidden * 2 + (hidden + weight) * 4
    split = Layout(4, tensor=2, pipeline=2)
    assert count(split, "first", trained=True) == 0
    assert count(split, "last", trained=False) == tile / 2 + hidden * 2
    many = replace(WORK, responses=2**20)
    assert count(Layout(1), "last", work=many, trained=False) == 2**25 // 160 * 160 * 2 * 4 + 2**20 * 64 * 2
