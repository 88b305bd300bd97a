"""A whole run: who is on a device when, what stays, and what is advised where it does not fit."""

from pathlib import Path
from typing import Any

import pytest

from iiverl_core.config import RunConfig, build, run_config
from iiverl_core.memory import (
    MemoryPlan,
    advice,
    checkpoint_size,
    find_facts,
    plan_memory,
    suggest_for_engine,
)
from iiverl_core.memory.plan import Phase
from iiverl_core.memory.work import work_of

SHAPES = Path(__file__).parents[2] / "examples" / "grpo_megatron" / "models"
GB = 10**9


def run_of(*, backend: str = "megatron", shape: str = "Qwen2.5-7B-Instruct", **sections: Any) -> RunConfig:
    """GRPO over eight devices, with a reference; `sections` are laid over actor, ref, rollout, trainer and others."""
    path = str(SHAPES / shape)
    megatron = {"tensor_model_parallel_size": 2}
    actor = {"use_kl_loss": True, "entropy_coeff": 0.0, "megatron": megatron, **sections.pop("actor", {})}
    rollout = {"n": 8, "tensor_model_parallel_size": 1, **sections.pop("rollout", {})}
    policy = {
        "model": {"path": path, "enable_gradient_checkpointing": True, **sections.pop("model", {})},
        "actor": actor,
        "ref": sections.pop("ref", {}),
        "rollout": rollout,
    }
    values = {
        "data": {"train_batch_size": 256, "max_prompt_length": 512, "max_response_length": 512},
        "algorithm": {"adv_estimator": "grpo"},
        "actor_rollout_ref": policy,
        "trainer": {"n_gpus_per_node": 8},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return run_config(build(values, backend))


def planned(run: RunConfig, device_memory: int = 80) -> MemoryPlan:
    return plan_memory(run, find_facts(run), device_memory * GB)


def phases(plan: MemoryPlan) -> dict[str, int]:
    return {phase.name: phase.total for phase in plan.phases}


def test_phases_are_those_of_the_models() -> None:
    assert list(phases(planned(run_of()))) == [
        "generate",
        "forward: actor",
        "forward: reference",
        "update: actor",
    ]
    value = {"enable": True, "model": {"path": str(SHAPES / "Qwen2.5-7B-Instruct")}}
    with_critic = planned(run_of(critic=value, reward_model=value))
    assert [model.role for model in with_critic.roles] == ["actor", "reference", "critic", "reward"]
    assert list(phases(with_critic))[-2:] == ["update: actor", "update: critic"]
    assert with_critic.roles[2].states.weights < with_critic.roles[0].states.weights  # a head for one number
    assert with_critic.roles[2].forward.head == 0


def test_the_engine_takes_its_share_and_sleeps() -> None:
    plan = planned(run_of(rollout={"gpu_memory_utilization": 0.5}))
    assert plan.engine.total == 40 * GB
    resident = sum(sum(model.resident.values()) for model in plan.roles)
    assert phases(plan)["generate"] == resident + 40 * GB
    awake = planned(run_of(rollout={"gpu_memory_utilization": 0.5, "free_cache_engine": False}))
    assert phases(awake)["update: actor"] == phases(plan)["update: actor"] + 40 * GB


def test_the_engine_keeps_its_weights_while_a_reward_model_scores() -> None:
    scored = {"enable": True, "model": {"path": str(SHAPES / "Qwen2.5-7B-Instruct")}}
    plan = planned(run_of(reward_model=scored))
    alone = planned(run_of(reward_model=scored, trainer={"rollout_devices": 4}))
    engine = plan.engine.total - plan.engine.cache
    assert phases(plan)["forward: reward"] == phases(alone)["forward: reward"] + engine
    assert phases(plan)["forward: actor"] == phases(alone)["forward: actor"]


def test_graphs_take_from_the_cache() -> None:
    eager, graphs = (planned(run_of(rollout={"enforce_eager": eager})).engine for eager in (True, False))
    assert eager.total == graphs.total
    assert eager.cache - graphs.cache == graphs.work - eager.work == 1.5 * GB


def test_the_cache_is_that_of_the_models() -> None:
    # 2 (keys and values) × layers × heads of them × 128 × 2 bytes
    assert planned(run_of()).engine.token == 2 * 28 * 4 * 128 * 2
    over = {"tensor_model_parallel_size": 8}
    large = planned(run_of(shape="Qwen3-32B", rollout=over)).engine
    assert large.token == 2 * 64 * 1 * 128 * 2
    assert large.tokens == large.cache // large.token
    assert large.sequences == large.tokens // 1024
    # Four heads over eight devices: each is on two of them.
    shared = planned(run_of(shape="Qwen3-235B-A22B", rollout=over)).engine
    assert shared.token == 2 * 94 * 1 * 128 * 2


def test_engines_apart_leave_the_training_devices() -> None:
    apart = planned(run_of(trainer={"rollout_devices": 4}))
    assert phases(apart)["generate"] == apart.engine.total
    assert phases(apart)["update: actor"] == phases(planned(run_of()))["update: actor"]


@pytest.mark.parametrize("key", ["param_offload", "grad_offload", "optimizer_offload"])
def test_what_is_offloaded_is_there_only_in_use(key: str) -> None:
    plan, kept = planned(run_of(actor={key: True})), planned(run_of())
    kind = {"param": "weights", "grad": "gradients", "optimizer": "optimizer"}[key.partition("_")[0]]
    saved = getattr(kept.roles[0].states, kind)
    assert saved > 0
    assert phases(kept)["generate"] - phases(plan)["generate"] == saved
    assert phases(kept)["update: actor"] == phases(plan)["update: actor"]
    in_forward = 0 if kind == "weights" else saved
    assert phases(kept)["forward: actor"] - phases(plan)["forward: actor"] == in_forward


def test_fsdp_frees_its_gradients_and_offloads_all_at_once() -> None:
    run = run_of(backend="fsdp")
    actor = planned(run).roles[0]
    assert set(actor.resident) == {"weights", "optimizer"}
    away = planned(run_of(backend="fsdp", actor={"fsdp_config": {"optimizer_offload": True}})).roles[0]
    assert (away.states.weights, sum(away.resident.values())) == (0, 0)
    assert away.states.gathered == actor.states.gathered


def test_micro_batches_are_the_largest_that_can_come() -> None:
    by_tokens = run_of(actor={"use_dynamic_bsz": True, "ppo_max_token_len_per_gpu": 4096})
    work = work_of(by_tokens, by_tokens.actor, train=True)
    assert (work.tokens, work.responses, work.checkpointing) == (4096, 7 * 512, True)
    by_count = run_of(actor={"ppo_micro_batch_size_per_gpu": 2})
    assert work_of(by_count, by_count.actor, train=True).tokens == 2 * 1024
    in_all = run_of(actor={"ppo_micro_batch_size": 16})
    assert work_of(in_all, in_all.actor, train=True).tokens == 4 * 1024
    few = run_of(actor={"ppo_mini_batch_size": 1, "use_dynamic_bsz": True})
    assert work_of(few, few.actor, train=True).tokens == 2 * 1024  # eight responses over four ranks
    assert not work_of(few, few.actor, train=False).checkpointing


@pytest.mark.parametrize(
    ("backend", "packed", "budget", "responses"),
    [
        ("fsdp", True, 2 * (512 + 8 * 512), 2 * 8 * 512),  # two groups of eight responses to one prompt
        ("fsdp", None, 2048, 3 * 512),  # a part of a group
        ("fsdp", False, 2 * (512 + 8 * 512), 512 + 8 * 512),  # each response with its prompt
        ("megatron", True, 2 * (512 + 8 * 512), 2 * 8 * 512),
    ],
)
def test_a_budget_holds_more_responses_if_they_share_prompts(
    backend: str, packed: bool | None, budget: int, responses: int
) -> None:
    batching = {"use_dynamic_bsz": True, "ppo_max_token_len_per_gpu": budget}
    run = run_of(backend=backend, model={"use_remove_padding": packed}, actor=batching)
    assert work_of(run, run.actor, train=True).responses == responses


def test_recomputing_some_layers_is_planned_and_advised_against() -> None:
    """`recompute_num_layers` and `recompute_method` of the section megatron."""

    def megatron(**recompute: Any) -> RunConfig:
        sizes = {"tensor_model_parallel_size": 2, **recompute}
        return run_of(actor={"megatron": sizes, "ppo_max_token_len_per_gpu": 65536})

    some, groups = (
        megatron(recompute_method="block", recompute_num_layers=4),
        megatron(recompute_num_layers=14),
    )
    for run, only_first, layers in ((some, True, 4), (groups, False, 14)):
        work = work_of(run, run.actor, train=True)
        assert (work.checkpointing, work.recomputed, work.only_first) == (True, layers, only_first)
    whole = phase_of(megatron())
    for run, key in ((some, "recompute_method"), (groups, "recompute_num_layers")):
        phase = phase_of(run)
        assert phase.total > whole.total
        assert phase.biggest == ("actor", "activations")
        assert key in advice(run, planned(run), phase)


def phase_of(run: RunConfig) -> Phase:
    return next(phase for phase in planned(run).phases if phase.name == "update: actor")


def test_what_fits_says_so_and_what_does_not_says_which_key() -> None:
    run = run_of(rollout={"gpu_memory_utilization": 0.4})
    assert planned(run).fits
    run = run_of(rollout={"gpu_memory_utilization": 0.9})
    plan = planned(run)
    assert [phase.name for phase in plan.too_large] == ["generate"]
    assert advice(run, plan, plan.peak).endswith("rollout.gpu_memory_utilization")
    run = run_of(rollout={"gpu_memory_utilization": 0.1})
    plan = planned(run)
    assert not plan.fits and not plan.engine.has_room
    assert "gpu_memory_utilization" in suggest_for_engine(run, plan)


@pytest.mark.parametrize(
    ("sections", "phase", "key"),
    [
        (
            {"model": {"enable_gradient_checkpointing": False}},
            "update: actor",
            "enable_gradient_checkpointing",
        ),
        (
            {"trainer": {"nnodes": 8}, "actor": {"megatron": {"tensor_model_parallel_size": 1}}},
            "update: actor",
            "tensor_model",
        ),
        ({"rollout": {"gpu_memory_utilization": 0.2}}, "forward: reference", "actor.grad_offload"),
        (
            {"shape": "Qwen3-32B", "actor": {"megatron": {"tensor_model_parallel_size": 8}}},
            "update: actor",
            "trainer.nnodes",
        ),
        (
            {
                "backend": "fsdp",
                "model": {"enable_gradient_checkpointing": True},
                "actor": {"use_dynamic_bsz": True, "ppo_max_token_len_per_gpu": 65536},
            },
            "update: actor",
            "ppo_max_token_len_per_gpu",
        ),
        ({"backend": "fsdp", "actor": {"ppo_micro_batch_size_per_gpu": 1}}, "update: actor", "param_offload"),
    ],
)
def test_advice_names_the_key_of_the_largest_item(sections: dict[str, Any], phase: str, key: str) -> None:
    run = run_of(**sections)
    plan = planned(run)
    found = next(part for part in plan.phases if part.name == phase)
    assert key in advice(run, plan, found), found.items


def test_a_checkpoint_has_weights_and_optimizer_once() -> None:
    """Whatever the layout; per process it is divided by those that hold different parameters."""
    run = run_of()
    facts = find_facts(run)
    parameters = facts["actor"].parameters
    sizes = {}
    for tensor, pipeline in ((1, 1), (2, 1), (2, 2)):
        layout = {"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline}
        sizes[tensor * pipeline] = size = checkpoint_size(run_of(actor={"megatron": layout}), facts)
        assert size.total == parameters * (2 + 12)  # bf16; fp32 copy and two moments
    assert sizes[1].per_rank == sizes[1].total
    assert sizes[2].per_rank == pytest.approx(sizes[1].total / 2, rel=0.01)
    assert sizes[4].per_rank == pytest.approx(sizes[1].total / 4, rel=0.15)  # the ends have the vocabulary
    sharded = checkpoint_size(run_of(backend="fsdp"), facts)
    assert sharded.total == parameters * (4 + 8)
    assert sharded.per_rank == pytest.approx(sharded.total / 8)
    contents = {"checkpoint": {"save_contents": ["model", "hf_model"]}}
    assert checkpoint_size(run_of(backend="fsdp", actor=contents), facts).total == parameters * (4 + 4)
    run = run_of(
        shape="Qwen3-235B-A22B",
        actor={"megatron": {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 8}},
    )
    facts = find_facts(run)
    shape, size = facts["actor"], checkpoint_size(run, facts)
    experts = len(shape.expert_layers) * shape.experts * shape.expert_parameters * (2 + 12)
    dense = size.total - experts
    assert experts > 0.9 * size.total
    assert size.per_rank == pytest.approx(experts / 8 + dense / 2, rel=0.01)
