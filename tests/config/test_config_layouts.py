"""Layouts of Megatron that cannot work, and what is said of each."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iiverl_core.config import load
from iiverl_core.config.splitting import engine_problem, nearest_sizes, splits

SECTION = "actor_rollout_ref.actor.megatron"
DENSE: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 37,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
EXPERTS: dict[str, Any] = {
    **DENSE,
    "model_type": "qwen3_moe",
    "num_experts": 12,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a dense model, one with experts, and one of other heads."""
    monkeypatch.chdir(tmp_path)
    for name, values in (
        ("dense", DENSE),
        ("experts", EXPERTS),
        ("other", {**DENSE, "num_attention_heads": 6}),
    ):
        Path(name).mkdir()
        Path(name, "config.json").write_text(json.dumps(values))
    return tmp_path


def told(*overrides: str, model: str = "./dense", backend: str = "megatron", **sizes: object) -> list[str]:
    """What is said of a layout: severity, key and message of all that names the layout's keys or the model."""
    Path("run.yaml").write_text("actor_rollout_ref: {rollout: {name: hf}}")
    given = [f"{SECTION}.{name.replace('_size', '_parallel_size')}={value}" for name, value in sizes.items()]
    given = [f"actor_rollout_ref.model.path={model}", "critic.enable=false", *given, *overrides]
    if not any("tensor_model" in override for override in given):
        given.append(f"{SECTION}.tensor_model_parallel_size=1")
    problems = load("run.yaml", given, backend).problems
    return [
        f"{p.severity} {p.key.replace(SECTION + '.', '')}: {p.message}"
        for p in problems
        if "parallel" in f"{p.key} {p.message}"
    ]


def test_a_layout_that_works_is_not_mentioned() -> None:
    assert told(tensor_model_size=2, pipeline_model_size=4) == []
    assert told(model="./experts", tensor_model_size=2, expert_model_size=4) == []
    assert (
        told("trainer.nnodes=2", tensor_model_size=4, pipeline_model_size=2, virtual_pipeline_model_size=3)
        == []
    )
    assert told(model="org/name", tensor_model_size=8) == []


def test_copies_divide_over_devices() -> None:
    assert told(tensor_model_size=4, pipeline_model_size=3) == [
        "error tensor_model_parallel_size: 8 devices (trainer.nnodes × trainer.n_gpus_per_node) do not divide into copies "
        "over 12: tensor_model_parallel_size (4) × pipeline_model_parallel_size (3) × context_parallel_size (1); "
        "pipeline_model_parallel_size 2 would do"
    ]
    assert told("trainer.n_gpus_per_node=2", tensor_model_size=4)[0].endswith(
        "tensor_model_parallel_size 2 would do"
    )
    many = told("trainer.n_gpus_per_node=1", tensor_model_size=2, pipeline_model_size=2)
    assert many[0].endswith("take more devices, or lower several of the sizes")


def test_experts_divide_over_devices() -> None:
    assert told(model="./experts", pipeline_model_size=2, expert_model_size=3) == [
        "error expert_model_parallel_size: the 4 devices of a pipeline stage do not divide into groups of 3; 2 or 4 would do"
    ]
    assert told("trainer.nnodes=2", model="./experts", expert_model_size=8) == [
        "error expert_model_parallel_size: the 12 experts of actor_rollout_ref.model.path (./experts) do not divide over 8 "
        "devices (expert_model_parallel_size); 6 or 12 would do"
    ]
    assert told(expert_model_size=2) == [
        "error expert_model_parallel_size: 2, and no model of this run has experts; set it to 1"
    ]
    assert told(model="org/name", expert_model_size=2) == []


def test_experts_need_sequence_parallelism() -> None:
    off = f"{SECTION}.sequence_parallel=false"
    assert told(off, tensor_model_size=2) == []
    assert told(off, model="./experts") == []
    assert told(off, model="./experts", tensor_model_size=2) == [
        "error sequence_parallel: actor_rollout_ref.model.path (./experts) has experts, which need sequence_parallel where "
        "tensor_model_parallel_size is above 1; set it to true"
    ]


def test_heads_and_layers_divide_over_devices() -> None:
    assert told("trainer.n_gpus_per_node=6", tensor_model_size=6) == [
        "error tensor_model_parallel_size: actor_rollout_ref.model.path (./dense) does not divide over 6 devices "
        "(tensor_model_parallel_size): it has 8 attention heads, 2 of keys and values, and layers of 96; 4 or 8 would do"
    ]
    # Expert-parallel ranks hold whole experts, so their inner size is no condition.
    assert told(model="./experts", tensor_model_size=8) == []


def test_layers_divide_into_stages() -> None:
    assert told(pipeline_model_size=8) == [
        "error pipeline_model_parallel_size: the 12 layers of actor_rollout_ref.model.path (./dense) do not divide into 8 "
        "stages (pipeline_model_parallel_size); 6 or 12 would do"
    ]
    assert told(pipeline_model_size=4, virtual_pipeline_model_size=2) == [
        "error pipeline_model_parallel_size: the 12 layers of actor_rollout_ref.model.path (./dense) do not divide into 4 "
        "stages (pipeline_model_parallel_size) of 2 chunks (virtual_pipeline_model_parallel_size); 3 or 6 would do"
    ]
    assert len(told(virtual_pipeline_model_size=1)) == 1
    assert told(virtual_pipeline_model_size=2) == [
        "error virtual_pipeline_model_parallel_size: virtual_pipeline_model_parallel_size (2) interleaves the chunks of "
        "pipeline stages, and there is one stage (pipeline_model_parallel_size); set it to null"
    ]


def test_rows_that_are_shared_are_padded() -> None:
    model, critic = "actor_rollout_ref.model", "critic.model"
    packed = [f"{model}.use_remove_padding=true", f"{critic}.use_remove_padding=true"]
    assert told(context_size=2) == []
    assert told(*packed) == []
    actors = (
        f"warning {model}.use_remove_padding: has no effect: rows that several devices share "
        f"({SECTION}.context_parallel_size is 2) are padded"
    )
    assert told(*packed, "algorithm.adv_estimator=grpo", context_size=2) == [actors]
    assert told(*packed, "critic.enable=true", "critic.model.path=./dense", context_size=2) == [
        actors,
        f"warning {critic}.use_remove_padding: has no effect: rows that several devices share "
        "(critic.megatron.context_parallel_size is 2) are padded",
    ]


def of_the_backend(*overrides: str, backend: str = "megatron") -> list[str]:
    """What is said of models that a backend does not know, and of dtypes that it does not train in."""
    Path("run.yaml").write_text("actor_rollout_ref: {rollout: {name: hf}}")
    given = ["actor_rollout_ref.model.path=./dense", f"{SECTION}.tensor_model_parallel_size=1", *overrides]
    problems = load("run.yaml", given, backend).problems
    return [
        f"{p.severity} {p.key}: {p.message}"
        for p in problems
        if "the backend megatron" in p.message or p.message.startswith(("fp16", "float16"))
    ]


def test_a_family_that_the_backend_does_not_know() -> None:
    for name, family in (("mistral", "mistral"), ("none", ""), ("llama", "llama"), ("qwen2", "qwen2")):
        Path(name).mkdir()
        Path(name, "config.json").write_text(json.dumps({**DENSE, "model_type": family}))
    answer = (
        "is of the family mistral; the backend megatron knows llama, qwen2, qwen3, qwen3_moe. Use --backend fsdp, which "
        "takes every causal LM of transformers"
    )
    path = "actor_rollout_ref.model.path"
    used = "actor_rollout_ref.actor.use_kl_loss=true"
    assert of_the_backend(f"{path}=./mistral", used) == [
        f"error {path}: the actor model './mistral' {answer}"
    ]
    for known in ("./llama", "./qwen2", "./dense", "./experts", "./none", "org/name"):
        assert of_the_backend(f"{path}={known}") == []
    assert of_the_backend(f"{path}=./mistral", backend="fsdp") == []
    others = ["critic.enable=true", "critic.model.path=./mistral"]
    assert of_the_backend(*others) == [f"error critic.model.path: the critic model './mistral' {answer}"]
    assert of_the_backend("critic.enable=false", "algorithm.adv_estimator=grpo", *others[1:]) == []


@pytest.mark.parametrize(
    ("changes", "answer"),
    [
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            "scales its rotary positions by yarn (rope_scaling); the backend megatron knows default, linear, llama3. Use "
            "--backend fsdp, or take rope_scaling out of its config.json",
        ),
        (
            {"attention_bias": True, "mlp_bias": True},
            "has biases in attention (attention_bias) and biases in MLPs (mlp_bias), which the backend megatron does not "
            "build. Use --backend fsdp",
        ),
        (
            {"use_sliding_window": True},
            "has a sliding window (use_sliding_window), which the backend megatron does not build. Use --backend fsdp",
        ),
        (
            {"hidden_act": "gelu"},
            "has the activation gelu (hidden_act), which the backend megatron does not build. Use --backend fsdp",
        ),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, None),
        ({"model_type": "qwen2", "attention_bias": True}, None),  # a Qwen2 reads no such key
        ({"rope_scaling": "no mapping"}, None),  # whoever builds the model tells
    ],
)
def test_parts_that_the_backend_does_not_build(changes: dict[str, Any], answer: str | None) -> None:
    Path("changed").mkdir()
    Path("changed", "config.json").write_text(json.dumps({**DENSE, "model_type": "llama", **changes}))
    path = "actor_rollout_ref.model.path"
    expected = [f"error {path}: the actor model './changed' {answer}"] if answer else []
    assert of_the_backend(f"{path}=./changed") == expected
    assert of_the_backend(f"{path}=./changed", backend="fsdp") == []


@pytest.mark.parametrize("dtype", ["fp16", "float16"])
def test_what_is_trained_has_a_dtype_that_needs_no_loss_scaling(dtype: str) -> None:
    answer = f"{dtype}, in which small gradients vanish: losses are not scaled; use bf16 or fp32"
    critic = ["critic.enable=true", "critic.model.path=./dense"]
    assert of_the_backend(*critic, f"{SECTION}.dtype={dtype}") == [f"error {SECTION}.dtype: {answer}"]
    assert of_the_backend(*critic, f"critic.megatron.dtype={dtype}") == [
        f"error critic.megatron.dtype: {answer}"
    ]
    used = "actor_rollout_ref.actor.use_kl_loss=true"
    assert of_the_backend(used, f"actor_rollout_ref.ref.megatron.dtype={dtype}") == []
    assert of_the_backend(f"{SECTION}.dtype={dtype}", backend="fsdp") == []
    assert of_the_backend(f"{SECTION}.dtype=bfloat16") == []


@pytest.mark.parametrize(
    ("section", "used"),
    [
        ("actor_rollout_ref.ref", "actor_rollout_ref.actor.use_kl_loss=true"),
        ("critic", "critic.enable=true"),
        ("reward_model", "reward_model.enable=true"),
    ],
)
def test_all_models_have_one_layout(section: str, used: str) -> None:
    key = f"{section}.megatron.pipeline_model_parallel_size"
    models = ["critic.model.path=./dense", "reward_model.model.path=./dense"]
    assert told(*models, used, f"{key}=2") == [
        f"error {key}: pipeline_model_parallel_size is 2, and {SECTION}.pipeline_model_parallel_size is 1: in this version "
        "all models have one layout; set only the actor's"
    ]
    assert told(*models, used, f"{key}=2", pipeline_model_size=2) == []
    unused = [
        used.replace("true", "false"),
        "algorithm.use_kl_in_reward=false",
        "algorithm.adv_estimator=grpo",
    ]
    assert not [line for line in told(*models, *unused, f"{key}=2") if line.startswith("error")]


def test_another_model_is_told_of_by_itself() -> None:
    models = ["critic.enable=true", "critic.model.path=./other", "trainer.n_gpus_per_node=4"]
    assert told(*models, tensor_model_size=4) == [
        "error critic.model.path: path (./other) does not divide over 4 devices "
        "(critic.megatron.tensor_model_parallel_size): it has 6 attention heads, 2 of keys and values, and layers of 96; 2 or "
        "6 would do"
    ]
    same = ["critic.enable=true", "critic.model.path=./dense"]
    assert len(told(*same, "trainer.n_gpus_per_node=6", tensor_model_size=6)) == 1


def test_micro_batches_divide_over_copies() -> None:
    def of_micro_batches(tensor: int) -> list[str]:
        given = [
            "actor_rollout_ref.actor.ppo_micro_batch_size=2",
            f"{SECTION}.tensor_model_parallel_size={tensor}",
        ]
        Path("run.yaml").write_text("actor_rollout_ref: {rollout: {name: hf}}")
        return [
            p.message for p in load("run.yaml", given, "megatron").problems if "sequences do not" in p.message
        ]

    assert of_micro_batches(4) == []
    (message,) = of_micro_batches(2)
    assert message.startswith("2 sequences do not divide over 4 copies of the model on 8 devices")


def test_fsdp_is_not_asked() -> None:
    assert not [line for line in told(backend="fsdp", tensor_model_size=3) if line.startswith("error")]


def test_engines_hold_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    vllm = ["actor_rollout_ref.rollout.name=vllm", "trainer.n_gpus_per_node=6"]
    size = "actor_rollout_ref.rollout.tensor_model_parallel_size"
    (message,) = [line for line in told(*vllm, f"{size}=3", backend="fsdp") if "does not divide" in line]
    assert message == (
        f"error {size}: tensor_model_parallel_size is 3, and actor_rollout_ref.model.path (./dense) does not divide over 3 "
        "devices: it has 8 attention heads, 2 of keys and values, and layers of 96. Set it to 2"
    )
    assert not [line for line in told(*vllm, f"{size}=2", backend="fsdp") if "does not divide" in line]


SIZES = st.integers(1, 64)


@given(SIZES, SIZES, SIZES)
def test_the_nearest_sizes_work_and_are_the_nearest(size: int, whole: int, most: int) -> None:
    words = nearest_sizes(size, most, lambda n: whole % n == 0)
    named = [int(word) for word in words.removesuffix(" would do").split(" or ") if word]
    works = [n for n in range(1, most + 1) if whole % n == 0 and n != size]
    below, above = [n for n in works if n < size], [n for n in works if n > size]
    assert named == [*below[-1:], *above[:1]]


@given(SIZES, SIZES, SIZES, SIZES)
def test_what_is_advised_for_an_engine_works(size: int, heads: int, kv_heads: int, inner: int) -> None:
    shape = {"heads": heads, "kv_heads": kv_heads, "inner": inner}
    problem = engine_problem(size, size, **shape)
    assert (problem is None) == splits(size, **shape)
    if problem:
        best = int(problem.rpartition(" ")[2])
        assert best < size and size % best == 0 and splits(best, **shape)
