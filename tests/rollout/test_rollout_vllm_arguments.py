"""What a configuration comes to in vLLM's terms, and which vLLM is accepted. Needs no vLLM."""

import re
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from iiverl_core.config import RunConfig, load, vllm
from iiverl_core.errors import ConfigError
from iiverl_core.rollout.vllm import engine_arguments
from iiverl_core.rollout.vllm.start import import_vllm

ROLLOUT = "actor_rollout_ref.rollout"


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., RunConfig]:
    def make(*overrides: str) -> RunConfig:
        path = tmp_path / "run.yaml"
        path.write_text("data:\n  max_prompt_length: 100\n  max_response_length: 300\n")
        settings = [f"{ROLLOUT}.name=vllm", f"{ROLLOUT}.tensor_model_parallel_size=1", *overrides]
        return load(path, settings).run

    return make


def test_graphs_are_for_devices_that_have_them(config) -> None:
    assert [engine_arguments(config(), device)["enforce_eager"] for device in ("cuda", "cpu")] == [
        False,
        True,
    ]
    assert engine_arguments(config(f"{ROLLOUT}.enforce_eager=true"), "cuda")["enforce_eager"]


def test_each_key_has_its_argument(config) -> None:
    keys = {
        "dtype": "bf16",
        "seed": 7,
        "gpu_memory_utilization": 0.3,
        "enforce_eager": False,
        "free_cache_engine": False,
        "max_num_batched_tokens": 2048,
        "max_num_seqs": 99,
        "max_model_len": 500,
        "enable_chunked_prefill": False,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
    }
    overrides = [f"{ROLLOUT}.{key}={value}" for key, value in keys.items()]
    model = ["path=/some/model", "trust_remote_code=true", "override_config.rope_theta=5"]
    arguments = engine_arguments(config(*overrides, *(f"actor_rollout_ref.model.{m}" for m in model)), "cuda")
    assert (
        arguments.items()
        >= {
            "model": "/some/model",
            "trust_remote_code": True,
            "dtype": "bfloat16",
            "seed": 7,
            "gpu_memory_utilization": 0.3,
            "enforce_eager": False,
            "enable_sleep_mode": False,
            "max_num_batched_tokens": 2048,
            "max_num_seqs": 99,
            "max_model_len": 500,
            "enable_chunked_prefill": False,
            "enable_prefix_caching": False,
            "disable_log_stats": False,
            "tensor_parallel_size": 1,
        }.items()
    )
    assert arguments["hf_overrides"] == {"rope_theta": 5}


@pytest.mark.parametrize("devices", [1, 2])
def test_options_of_compilation_are_beside_those_that_the_engine_needs(config, devices: int) -> None:
    arguments = engine_arguments(
        config(
            f"{ROLLOUT}.cudagraph_capture_sizes=[1, 2]",
            f"{ROLLOUT}.engine_kwargs.vllm.compilation_config.pass_config.enable_sp=true",
            f"{ROLLOUT}.tensor_model_parallel_size={devices}",
            "trainer.n_gpus_per_node=2",
        ),
        "cuda",
    )
    passes = {"enable_sp": True} | ({"fuse_allreduce_rms": False} if devices > 1 else {})
    assert arguments["compilation_config"] == {"cudagraph_capture_sizes": [1, 2], "pass_config": passes}


def test_an_engine_over_several_devices_has_a_process_on_each(config) -> None:
    alone, together = (
        engine_arguments(config(f"{ROLLOUT}.tensor_model_parallel_size={n}"), "cuda") for n in (1, 4)
    )
    assert together["tensor_parallel_size"] == 4
    assert together["distributed_executor_backend"].endswith(".GroupExecutor")
    over_devices = {"distributed_executor_backend", "disable_custom_all_reduce", "compilation_config"}
    assert alone.keys() == together.keys() - over_devices


def test_what_a_key_does_not_decide(config) -> None:
    arguments = engine_arguments(config(), "cuda")
    assert arguments["max_model_len"] == 400
    assert arguments["load_format"] == "dummy"
    assert arguments["enable_prefix_caching"] and arguments["enable_sleep_mode"]
    assert arguments["logprobs_mode"] == "processed_logprobs"
    assert arguments["skip_tokenizer_init"]


@pytest.mark.parametrize(
    ("overrides", "asked"),
    [
        ([], False),
        ([f"{ROLLOUT}.top_p=0.8"], True),
        ([f"{ROLLOUT}.top_k=20"], True),
        ([f"{ROLLOUT}.top_k=20", f"{ROLLOUT}.do_sample=false"], False),
        ([f"{ROLLOUT}.top_k=20", f"{ROLLOUT}.engine_kwargs.vllm.return_sampling_mask=false"], False),
    ],
)
def test_the_trainer_is_to_know_which_tokens_were_kept(config, overrides: list[str], asked: bool) -> None:
    assert engine_arguments(config(*overrides), "cuda")["return_sampling_mask"] is asked
    assert not engine_arguments(config(*overrides), "cpu")["return_sampling_mask"]


def test_engines_apart_keep_their_memory(config) -> None:
    apart = config("trainer.rollout_devices=1", f"{ROLLOUT}.tensor_model_parallel_size=1")
    assert not engine_arguments(apart, "cuda")["enable_sleep_mode"]


def test_a_cpu_has_no_share_of_memory_and_does_not_sleep(config) -> None:
    arguments = engine_arguments(config(), "cpu")
    assert arguments["kv_cache_memory_bytes"] == 2**30
    assert not arguments.keys() & {"gpu_memory_utilization", "enable_sleep_mode"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dummy_dtensor", "dummy"),
        ("dummy_megatron", "dummy"),
        ("dummy_hf", "dummy"),
        ("hf", "auto"),
        ("dtensor", "auto"),
        ("safetensors", "safetensors"),
    ],
)
def test_names_of_load_formats(config, name, expected) -> None:
    assert engine_arguments(config(f"{ROLLOUT}.load_format={name}"), "cpu")["load_format"] == expected


def test_what_is_passed_on_comes_last(config) -> None:
    extra = {"kv_cache_memory_bytes": 5, "seed_offset": 3, "block_size": 32}
    overrides = [f"{ROLLOUT}.engine_kwargs.vllm.{name}={value}" for name, value in extra.items()]
    assert engine_arguments(config(*overrides), "cpu").items() >= extra.items()


@pytest.mark.parametrize(
    ("passed_on", "message"),
    [
        (
            "model=x",
            r"engine_kwargs\.vllm\.model has a key of its own: set actor_rollout_ref\.model\.path",
        ),
        (
            "distributed_executor_backend=mp",
            rf"engine_kwargs\.vllm\.distributed_executor_backend is decided by {ROLLOUT}\.tensor_model_parallel_size",
        ),
        (
            "skip_tokenizer_init=false",
            r"engine_kwargs\.vllm\.skip_tokenizer_init is decided by the engine",
        ),
    ],
)
def test_what_has_a_key_of_its_own_is_not_passed_on(config, passed_on, message) -> None:
    with pytest.raises(ConfigError, match=message):
        engine_arguments(config(f"{ROLLOUT}.engine_kwargs.vllm.{passed_on}"), "cpu")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["max_model_len=399"], rf"{ROLLOUT}\.max_model_len is 399, .* 400 tokens"),
        (
            ["max_num_batched_tokens=300", "enable_chunked_prefill=false"],
            r"max_num_batched_tokens is 300, .* 400",
        ),
        (
            ["max_num_batched_tokens=500", "max_num_seqs=1024"],
            r"max_num_batched_tokens \(500\) is below .*max_num_seqs \(1024\)",
        ),
    ],
)
def test_keys_that_exclude_each_other(config, overrides, message) -> None:
    with pytest.raises(ConfigError, match=message):
        engine_arguments(config(*(f"{ROLLOUT}.{override}" for override in overrides)), "cpu")


@pytest.mark.parametrize("found", ["0.32.0", "0.32.0+cpu", "0.32.7", "0.32.1rc1"])
def test_versions_that_are_supported(found) -> None:
    assert vllm.version_problem(found) is None


@pytest.mark.parametrize("found", ["0.31.9", "0.33.0", "0.3.2", "1.0.0", "0.33.0rc1", "dev", None])
def test_versions_that_are_not_are_told_before_and_at_the_start(found, monkeypatch, tmp_path) -> None:
    told = (
        rf"vLLM {found} is installed, .* vllm>=0\.32,<0\.33"
        if found
        else r"not installed.*: uv pip install 'vllm>=0\.32,<0\.33' .*make setup-vllm"
    )

    def version(name: str) -> str:
        if found is None:
            raise PackageNotFoundError(name)
        return found

    monkeypatch.setattr(vllm, "version", version)
    with pytest.raises(ConfigError, match=told):
        import_vllm()
    path = tmp_path / "run.yaml"
    path.write_text("actor_rollout_ref:\n  rollout:\n    name: vllm\n    tensor_model_parallel_size: 1\n")
    unsupported = [problem.message for problem in load(path).problems if problem.severity == "unsupported"]
    assert any(re.search(told, message) for message in unsupported)
