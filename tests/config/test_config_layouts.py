"""Layouts of Megatron that cannot work, and the message about each."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iiverl_core.config import Problem, load
from iiverl_core.config.model_facts import engine_problem, nearest_sizes, splits

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


def problems_of(
    *overrides: str, model: str = "./dense", backend: str = "megatron", **sizes: object
) -> list[Problem]:
    """What is wrong with a layout: of the sizes of the actor, and further overrides."""
    Path("run.yaml").write_text("actor_rollout_ref: {rollout: {name: hf}}")
    given = [f"{SECTION}.{name.replace('_size', '_parallel_size')}={value}" for name, value in sizes.items()]
    given = [f"actor_rollout_ref.model.path={model}", "critic.enable=false", *given, *overrides]
    if not any("tensor_model" in override for override in given):
        given.append(f"{SECTION}.tensor_model_parallel_size=1")
    return list(load("run.yaml", given, backend).problems)


def reported(*overrides: str, **layout: Any) -> list[str]:
    """Code and key of each problem of a layout."""
    return [
        f"{p.code} {p.key.replace(SECTION + '.', '')}"
        for p in problems_of(*overrides, **layout)
        if p.code.startswith("C8") or (p.severity == "error" and "parallel" in p.key)
    ]


def advised(*overrides: str, **layout: Any) -> list[list[int]]:
    """The numbers that are advised, those at the end of the message of each."""
    found = [p for p in problems_of(*overrides, **layout) if p.code.startswith("C8")]
    return [[int(number) for number in re.findall(r"\d+", re.split(r"; |\. ", p.message)[-1])] for p in found]


def test_a_layout_that_works_is_not_mentioned() -> None:
    assert reported(tensor_model_size=2, pipeline_model_size=4) == []
    assert reported(model="./experts", tensor_model_size=2, expert_model_size=4) == []
    assert (
        reported(
            "trainer.nnodes=2", tensor_model_size=4, pipeline_model_size=2, virtual_pipeline_model_size=3
        )
        == []
    )
    assert reported(model="org/name", tensor_model_size=8) == []


def test_copies_divide_over_devices() -> None:
    assert reported(tensor_model_size=4, pipeline_model_size=3) == ["C801 tensor_model_parallel_size"]
    assert advised(tensor_model_size=4, pipeline_model_size=3) == [[2]]
    assert advised("trainer.n_gpus_per_node=2", tensor_model_size=4) == [[2]]
    assert advised("trainer.n_gpus_per_node=1", tensor_model_size=2, pipeline_model_size=2) == [[]]


def test_experts_divide_over_devices() -> None:
    assert reported(model="./experts", pipeline_model_size=2, expert_model_size=3) == [
        "C802 expert_model_parallel_size"
    ]
    assert advised(model="./experts", pipeline_model_size=2, expert_model_size=3) == [[2, 4]]
    assert reported("trainer.nnodes=2", model="./experts", expert_model_size=8) == [
        "C811 expert_model_parallel_size"
    ]
    assert advised("trainer.nnodes=2", model="./experts", expert_model_size=8) == [[6, 12]]
    assert reported(expert_model_size=2) == ["C803 expert_model_parallel_size"]
    assert reported(model="org/name", expert_model_size=2) == []


def test_experts_need_sequence_parallelism() -> None:
    off = f"{SECTION}.sequence_parallel=false"
    assert reported(off, tensor_model_size=2) == []
    assert reported(off, model="./experts") == []
    assert reported(off, model="./experts", tensor_model_size=2) == ["C812 sequence_parallel"]


def test_heads_and_layers_divide_over_devices() -> None:
    assert reported("trainer.n_gpus_per_node=6", tensor_model_size=6) == ["C809 tensor_model_parallel_size"]
    assert advised("trainer.n_gpus_per_node=6", tensor_model_size=6) == [[4, 8]]
    # Expert-parallel ranks hold whole experts, so their inner size is no condition.
    assert reported(model="./experts", tensor_model_size=8) == []


def test_layers_divide_into_stages() -> None:
    assert reported(pipeline_model_size=8) == ["C810 pipeline_model_parallel_size"]
    assert advised(pipeline_model_size=8) == [[6, 12]]
    chunked = {"pipeline_model_size": 4, "virtual_pipeline_model_size": 2}
    assert reported(**chunked) == ["C810 pipeline_model_parallel_size"]
    assert advised(**chunked) == [[3, 6]]
    assert len(reported(virtual_pipeline_model_size=1)) == 1
    assert reported(virtual_pipeline_model_size=2) == ["C808 virtual_pipeline_model_parallel_size"]


def test_rows_that_are_shared_are_padded() -> None:
    model, critic = "actor_rollout_ref.model", "critic.model"
    packed = [f"{model}.use_remove_padding=true", f"{critic}.use_remove_padding=true"]
    assert reported(context_size=2) == []
    assert reported(*packed) == []
    actors = f"C807 {model}.use_remove_padding"
    assert reported(*packed, "algorithm.adv_estimator=grpo", context_size=2) == [actors]
    assert reported(*packed, "critic.enable=true", "critic.model.path=./dense", context_size=2) == [
        actors,
        f"C807 {critic}.use_remove_padding",
    ]


def of_the_backend(*overrides: str, backend: str = "megatron") -> list[str]:
    """Messages about models that a backend does not support, and dtypes that it cannot train in."""
    Path("run.yaml").write_text("actor_rollout_ref: {rollout: {name: hf}}")
    given = ["actor_rollout_ref.model.path=./dense", f"{SECTION}.tensor_model_parallel_size=1", *overrides]
    problems = load("run.yaml", given, backend).problems
    return [f"{p.code} {p.key}" for p in problems if p.code in ("C805", "C806")]


def test_a_family_that_the_backend_does_not_know() -> None:
    for name, family in (("mistral", "mistral"), ("none", ""), ("llama", "llama"), ("qwen2", "qwen2")):
        Path(name).mkdir()
        Path(name, "config.json").write_text(json.dumps({**DENSE, "model_type": family}))
    path = "actor_rollout_ref.model.path"
    used = "actor_rollout_ref.actor.use_kl_loss=true"
    assert of_the_backend(f"{path}=./mistral", used) == [f"C805 {path}"]
    for known in ("./llama", "./qwen2", "./dense", "./experts", "./none", "org/name"):
        assert of_the_backend(f"{path}={known}") == []
    assert of_the_backend(f"{path}=./mistral", backend="fsdp") == []
    others = ["critic.enable=true", "critic.model.path=./mistral"]
    assert of_the_backend(*others) == ["C805 critic.model.path"]
    assert of_the_backend("critic.enable=false", "algorithm.adv_estimator=grpo", *others[1:]) == []


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, ["yarn", "rope_scaling"]),
        ({"attention_bias": True, "mlp_bias": True}, ["attention_bias", "mlp_bias"]),
        ({"use_sliding_window": True}, ["use_sliding_window"]),
        ({"hidden_act": "gelu"}, ["gelu", "hidden_act"]),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, []),
        ({"model_type": "qwen2", "attention_bias": True}, []),  # a Qwen2 reads no such key
        ({"rope_scaling": "no mapping"}, []),  # whoever builds the model reports it
    ],
)
def test_parts_that_the_backend_does_not_build(changes: dict[str, Any], named: list[str]) -> None:
    Path("changed").mkdir()
    Path("changed", "config.json").write_text(json.dumps({**DENSE, "model_type": "llama", **changes}))
    path = "actor_rollout_ref.model.path"
    found = [p for p in problems_of(model="./changed") if p.code == "C805"]
    assert [p.key for p in found] == ([path] if named else [])
    assert all(word in p.message for p in found for word in named)
    assert of_the_backend(f"{path}=./changed", backend="fsdp") == []


@pytest.mark.parametrize("dtype", ["fp16", "float16"])
def test_what_is_trained_has_a_dtype_that_needs_no_loss_scaling(dtype: str) -> None:
    critic = ["critic.enable=true", "critic.model.path=./dense"]
    assert of_the_backend(*critic, f"{SECTION}.dtype={dtype}") == [f"C806 {SECTION}.dtype"]
    assert of_the_backend(*critic, f"critic.megatron.dtype={dtype}") == ["C806 critic.megatron.dtype"]
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
    assert reported(*models, used, f"{key}=2") == [f"C804 {key}"]
    assert reported(*models, used, f"{key}=2", pipeline_model_size=2) == []
    unused = [
        used.replace("true", "false"),
        "algorithm.use_kl_in_reward=false",
        "algorithm.adv_estimator=grpo",
    ]
    assert reported(*models, *unused, f"{key}=2") == []


def test_another_model_is_reported_by_itself() -> None:
    models = ["critic.enable=true", "critic.model.path=./other", "trainer.n_gpus_per_node=4"]
    assert reported(*models, tensor_model_size=4) == ["C809 critic.model.path"]
    assert advised(*models, tensor_model_size=4) == [[2, 6]]
    same = ["critic.enable=true", "critic.model.path=./dense"]
    assert len(reported(*same, "trainer.n_gpus_per_node=6", tensor_model_size=6)) == 1


def test_micro_batches_divide_over_copies() -> None:
    def of_micro_batches(tensor: int) -> list[str]:
        given = [
            "actor_rollout_ref.actor.ppo_micro_batch_size=2",
            f"{SECTION}.tensor_model_parallel_size={tensor}",
        ]
        Path("run.yaml").write_text("actor_rollout_ref: {rollout: {name: hf}}")
        return [p.message for p in load("run.yaml", given, "megatron").problems if p.code == "C105"]

    assert of_micro_batches(4) == []
    (message,) = of_micro_batches(2)
    assert "4 copies of the model" in message


def test_fsdp_is_not_asked() -> None:
    assert reported(backend="fsdp", tensor_model_size=3) == []


def test_engines_hold_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    vllm = ["actor_rollout_ref.rollout.name=vllm", "trainer.n_gpus_per_node=6"]
    size = "actor_rollout_ref.rollout.tensor_model_parallel_size"
    assert reported(*vllm, f"{size}=3", backend="fsdp") == [f"C813 {size}"]
    assert advised(*vllm, f"{size}=3", backend="fsdp") == [[2]]
    assert reported(*vllm, f"{size}=2", backend="fsdp") == []


SIZES = st.integers(1, 64)


@given(SIZES, SIZES, SIZES)
def test_the_nearest_sizes_work_and_are_the_nearest(size: int, whole: int, most: int) -> None:
    words = nearest_sizes(size, most, lambda n: whole % n == 0)
    named = [int(word) for word in words.split(" or ") if word]
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
