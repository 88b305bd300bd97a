"""Weights, gradients and optimizer state: what all devices hold together is the model, as often as it is copied."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iiverl_core.config import ModelConfig
from iiverl_core.config.model_facts import ModelFacts
from iiverl_core.memory.layout import Layout
from iiverl_core.memory.states import held, held_trained, model_parameters, states, trained_parameters

DENSE = ModelFacts(
    model_type="qwen2",
    vocabulary=160,
    hidden_size=64,
    intermediate_size=96,
    layers=8,
    heads=8,
    kv_heads=4,
    head_dim=8,
    qkv_bias=True,
)
EXPERTS = ModelFacts(
    model_type="qwen3_moe",
    vocabulary=160,
    hidden_size=64,
    intermediate_size=96,
    layers=8,
    heads=8,
    kv_heads=4,
    head_dim=8,
    qk_norm=True,
    experts=16,
    experts_per_token=2,
    expert_size=24,
    expert_layers=tuple(range(8)),
)
ADAPTED = ModelConfig(lora_rank=8)
POWERS = st.sampled_from([1, 2, 4])


def test_one_device_holds_the_whole_model() -> None:
    for facts in (DENSE, EXPERTS):
        assert held(facts, Layout(1), "first", language=True).all == facts.parameters
        assert held(facts, Layout(1), "last", language=False).all == model_parameters(facts, language=False)


@given(POWERS, POWERS)
def test_tensor_parallel_devices_hold_all_but_norms_once(tensor: int, pipeline: int) -> None:
    layout = Layout(tensor * pipeline, tensor=tensor, pipeline=pipeline)
    middle = (pipeline - 2) * tensor * (held(DENSE, layout, "first", language=True).all)
    ends = ("first", "last") if pipeline > 1 else ("first",)
    together = sum(tensor * held(DENSE, layout, end, language=True).all for end in ends)
    if pipeline > 2:  # a stage between them has no embedding
        together += middle - (pipeline - 2) * DENSE.embedding_parameters
    norms = DENSE.layers * DENSE.norm_parameters + DENSE.hidden_size
    assert together == DENSE.parameters + (tensor - 1) * norms


@given(POWERS, POWERS)
def test_experts_are_spread_whole(expert: int, tensor: int) -> None:
    one = held(EXPERTS, Layout(16), "first", language=True)
    part = held(EXPERTS, Layout(16, tensor=tensor, expert=expert), "first", language=True)
    assert part.experts * expert == one.experts == 8 * 16 * EXPERTS.expert_parameters
    assert (part.dense == one.dense) == (tensor == 1)


@pytest.mark.parametrize(("weight_bytes", "whole"), [(2, 2 + 4 + 12), (4, 4 + 4 + 8)])
@pytest.mark.parametrize("facts", [DENSE, EXPERTS])
def test_a_parameter_costs_18_bytes_or_16_in_fp32(facts: ModelFacts, weight_bytes: int, whole: int) -> None:
    own = states(facts, Layout(1, weight_bytes=weight_bytes), "first", language=True, trained=True)
    assert own.weights + own.gradients + own.optimizer == whole * facts.parameters
    assert own.weights == weight_bytes * facts.parameters


@given(POWERS, POWERS, POWERS)
def test_the_optimizer_is_divided_over_all_copies(tensor: int, context: int, data: int) -> None:
    layout = Layout(tensor * context * data, tensor=tensor, context=context)
    own = states(DENSE, layout, "first", language=True, trained=True)
    part = held(DENSE, layout, "first", language=True).all
    assert own.weights == 2 * part
    assert 0 <= own.optimizer * context * data - 12 * part < context * data


@given(POWERS, POWERS)
def test_the_experts_optimizer_is_divided_over_their_copies(expert: int, tensor: int) -> None:
    layout = Layout(16, tensor=tensor, expert=expert)
    own = states(EXPERTS, layout, "first", language=True, trained=True)
    part = held(EXPERTS, layout, "first", language=True)
    assert own.optimizer == pytest.approx(12 * (part.dense * tensor + part.experts * expert) / 16, abs=2)


def test_tied_embeddings_are_on_both_ends_of_a_pipeline() -> None:
    tied = ModelFacts(**{**DENSE.__dict__, "tied_embeddings": True})
    assert tied.parameters == DENSE.parameters - DENSE.embedding_parameters
    alone = held(tied, Layout(1), "first", language=True)
    assert alone.all == tied.parameters
    layout = Layout(2, pipeline=2)
    ends = [held(tied, layout, end, language=True).all for end in ("first", "last")]
    assert sum(ends) == tied.parameters + tied.embedding_parameters


def test_fsdp_divides_everything_and_collects_a_layer() -> None:
    layout = Layout(8, sharded=True, master_bytes=4)
    own = states(DENSE, layout, "first", language=True, trained=True)
    shard = -(-DENSE.parameters // 8) * 4
    assert (own.weights, own.gradients, own.optimizer) == (shard, shard, 2 * shard)
    layer = DENSE.attention_parameters + DENSE.norm_parameters + DENSE.mlp_parameters
    ends = 2 * DENSE.embedding_parameters + DENSE.hidden_size
    assert own.gathered == 2 * 2 * (ends + 2 * layer)
    kept = states(DENSE, Layout(8, sharded=True, stays_gathered=True), "first", language=True, trained=True)
    rest = DENSE.parameters - ends - 2 * layer
    assert kept.gathered == own.gathered + 2 * rest
    whole = Layout(8, sharded=True, master_bytes=4, whole_gradient_bytes=2)
    once = states(DENSE, whole, "first", language=True, trained=True)
    assert once == replace(own, gradients=shard + 2 * DENSE.parameters)
    offloaded = Layout(8, sharded=True, offloaded=frozenset({"weights", "gradients", "optimizer"}))
    waiting = states(DENSE, offloaded, "first", language=True, trained=True)
    assert (waiting.weights, waiting.gradients, waiting.optimizer, waiting.gathered) == (
        0,
        0,
        0,
        own.gathered,
    )


def test_what_is_not_trained_has_weights_alone() -> None:
    own = states(DENSE, Layout(1), "first", language=True, trained=False)
    assert (own.weights, own.gradients, own.optimizer) == (2 * DENSE.parameters, 0, 0)


@given(POWERS, POWERS)
def test_tensor_parallelism_divides_one_matrix_of_each_adapter(tensor: int, pipeline: int) -> None:
    layout = Layout(8 * tensor * pipeline, tensor=tensor, pipeline=pipeline)
    layers = DENSE.layers // pipeline
    divided = 64 + 2 * 32 + 2 * 96 + (64 + 96)  # B of q, k, v, gate and up; A of o and down
    copied = 5 * 64 + 2 * 64
    count = held_trained(DENSE, ADAPTED, layout, "first", language=True)
    assert count == layers * 8 * (divided // tensor + copied)
    assert held_trained(DENSE, ADAPTED, layout, "last", language=False) == count + DENSE.hidden_size
    if tensor == pipeline == 1:
        assert count == trained_parameters(DENSE, ADAPTED, language=True)
    own = states(DENSE, layout, "first", language=True, trained=True, adapter=count)
    frozen = states(DENSE, layout, "first", language=True, trained=False)
    assert (own.weights, own.gradients) == (frozen.weights + 4 * count, 4 * count)
    assert 0 <= own.optimizer * 8 - 8 * count < 8 * 8


def test_frozen_weights_have_no_gradients_and_no_moments() -> None:
    trained = trained_parameters(DENSE, ADAPTED, language=True)
    inputs_and_outputs = 8 * (
        4 * 64 + 2 * 64 + 2 * 32 + 3 * (64 + 96)
    )  # of q, k, v, o, gate, up and down in 8 layers
    assert trained == 8 * inputs_and_outputs
    layout = Layout(4, sharded=True, master_bytes=2)
    own = states(DENSE, layout, "first", language=True, trained=True, adapter=trained)
    assert own.weights == DENSE.parameters * 2 // 4 + trained // 4 * 4
    assert (own.gradients, own.optimizer) == (trained // 4 * 4, trained // 4 * 8)
    experts = [name for name in EXPERTS.linear_layers if "mlp" in name]
    assert not experts  # transformers has them as one tensor, which has no adapter
