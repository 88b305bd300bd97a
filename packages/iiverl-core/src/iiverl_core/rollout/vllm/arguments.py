"""From the configuration to vLLM's arguments. Knows neither torch nor vLLM."""

from collections.abc import Mapping
from typing import Any

from iiverl_core.config import Config, RolloutConfig
from iiverl_core.errors import ConfigError

SECTION = "actor_rollout_ref.rollout"
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
CHECKPOINT_FORMATS = {"hf", "dtensor", "megatron"}  # names for the model's own files
CPU_CACHE_BYTES = 2**30  # of keys and values, where memory is shared with training

OWN = {
    "model": "actor_rollout_ref.model.path",
    "trust_remote_code": "actor_rollout_ref.model.trust_remote_code",
    "hf_overrides": "actor_rollout_ref.model.override_config",
    "dtype": f"{SECTION}.dtype",
    "seed": f"{SECTION}.seed",
    "tensor_parallel_size": f"{SECTION}.tensor_model_parallel_size",
    "gpu_memory_utilization": f"{SECTION}.gpu_memory_utilization",
    "enforce_eager": f"{SECTION}.enforce_eager",
    "max_num_batched_tokens": f"{SECTION}.max_num_batched_tokens",
    "max_num_seqs": f"{SECTION}.max_num_seqs",
    "max_model_len": f"{SECTION}.max_model_len",
    "enable_chunked_prefill": f"{SECTION}.enable_chunked_prefill",
    "disable_log_stats": f"{SECTION}.disable_log_stats",
    "load_format": f"{SECTION}.load_format",
    "enable_sleep_mode": f"{SECTION}.free_cache_engine",
}
"""Arguments that have a key of their own."""

EXECUTOR = "distributed_executor_backend"
FIXED = {
    "skip_tokenizer_init": True,  # token ids go in and out
    "generation_config": "vllm",  # sampling is what the run's file says, not what the model's folder says
    "logprobs_mode": "processed_logprobs",  # under the distribution that was sampled from
    "worker_extension_cls": "iiverl_core.rollout.vllm.worker.WorkerExtension",
}
"""Arguments on which the engine relies."""

OVER_DEVICES = {
    EXECUTOR: "iiverl_core.rollout.vllm.group.GroupExecutor",
    "disable_custom_all_reduce": True,  # it needs every process to see the devices of the others; so does the next
    "compilation_config": {"pass_config": {"fuse_allreduce_rms": False}},
}
"""More of them, where an engine is spread over several devices, with a process on each."""


def engine_arguments(config: Config, device_type: str) -> dict[str, Any]:
    """Give the keyword arguments of `vllm.LLM` that a configuration asks for on `cpu` or `cuda`.

    Raises:
        ConfigError: keys exclude each other, or `engine_kwargs` holds what has a key of its own.
    """
    rollout, model = config.actor_rollout_ref.rollout, config.actor_rollout_ref.model
    passed_on = rollout.engine_kwargs.vllm
    _check_passed_on(passed_on)
    arguments = {
        "model": model.path,
        "trust_remote_code": model.trust_remote_code,
        "hf_overrides": dict(model.override_config),
        "dtype": DTYPES.get(rollout.dtype, rollout.dtype),
        "seed": rollout.seed % 2**32,
        "tensor_parallel_size": rollout.tensor_model_parallel_size,
        "enforce_eager": rollout.enforce_eager,
        "max_num_batched_tokens": rollout.max_num_batched_tokens,
        "max_num_seqs": rollout.max_num_seqs,
        "max_model_len": rollout.max_model_len or rollout.prompt_length + rollout.response_length,
        "enable_chunked_prefill": rollout.enable_chunked_prefill,
        "disable_log_stats": rollout.disable_log_stats,
        "load_format": _load_format(rollout.load_format),
        "enable_prefix_caching": True,  # the responses to a prompt share it
        **_memory(config, device_type),
        **FIXED,
        **(OVER_DEVICES if config.engine_devices > 1 else {}),
        **passed_on,
    }
    _check_lengths(rollout, arguments["max_model_len"])
    return arguments


def _memory(config: Config, device_type: str) -> dict[str, Any]:
    rollout = config.actor_rollout_ref.rollout
    if device_type == "cpu":
        # There, a share of memory would be one of all memory, whoever uses it, and nothing can be put to sleep.
        return {"kv_cache_memory_bytes": CPU_CACHE_BYTES}
    return {
        "gpu_memory_utilization": rollout.gpu_memory_utilization,
        # Engines apart have their devices to themselves.
        "enable_sleep_mode": rollout.free_cache_engine and not config.trainer.rollout_devices,
    }


def _load_format(name: str) -> str:
    """`dummy_dtensor` and its like are vLLM's `dummy`: the trained weights follow before anything is generated."""
    if name.startswith("dummy"):
        return "dummy"
    return "auto" if name in CHECKPOINT_FORMATS else name


def _check_passed_on(passed_on: Mapping[str, Any]) -> None:
    for name in passed_on:
        where = f"{SECTION}.engine_kwargs.vllm.{name}"
        if name in OWN:
            raise ConfigError(f"{where} has a key of its own: set {OWN[name]} instead")
        if name in FIXED:
            raise ConfigError(f"{where} is decided by the engine ({FIXED[name]}): remove it")
        if name == EXECUTOR:
            raise ConfigError(f"{where} is decided by {OWN['tensor_parallel_size']}: remove it")


def _check_lengths(rollout: RolloutConfig, max_model_len: int) -> None:
    needed = rollout.prompt_length + rollout.response_length
    if max_model_len < needed:
        raise ConfigError(
            f"{SECTION}.max_model_len is {max_model_len}, and prompt and response together may have {needed} tokens "
            f"(data.max_prompt_length + data.max_response_length): raise it to {needed}, or set it to null"
        )
    if not rollout.enable_chunked_prefill and rollout.max_num_batched_tokens < max_model_len:
        raise ConfigError(
            f"{SECTION}.max_num_batched_tokens is {rollout.max_num_batched_tokens}, and without enable_chunked_prefill "
            f"a whole sequence of {max_model_len} tokens must fit: raise it, or enable {SECTION}.enable_chunked_prefill"
        )
    if rollout.max_num_batched_tokens < rollout.max_num_seqs:
        raise ConfigError(
            f"{SECTION}.max_num_batched_tokens ({rollout.max_num_batched_tokens}) is below {SECTION}.max_num_seqs "
            f"({rollout.max_num_seqs}), and each sequence needs a token: raise the one or lower the other"
        )
