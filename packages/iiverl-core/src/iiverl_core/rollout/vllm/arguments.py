"""From the configuration to vLLM's arguments. Knows neither torch nor vLLM."""

from collections.abc import Mapping
from typing import Any

from iiverl_core.config import ROLE_KEYS, ROLLOUT, RolloutConfig, RunConfig
from iiverl_core.errors import ConfigError

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
CHECKPOINT_FORMATS = {"hf", "dtensor", "megatron"}  # names for the model's own files
MODEL = ROLE_KEYS["actor"].model
CPU_CACHE_BYTES = 2**30  # of keys and values, where memory is shared with training

OWN = {
    "model": f"{MODEL}.path",
    "trust_remote_code": f"{MODEL}.trust_remote_code",
    "hf_overrides": f"{MODEL}.override_config",
    "dtype": f"{ROLLOUT}.dtype",
    "seed": f"{ROLLOUT}.seed",
    "tensor_parallel_size": f"{ROLLOUT}.tensor_model_parallel_size",
    "gpu_memory_utilization": f"{ROLLOUT}.gpu_memory_utilization",
    "enforce_eager": f"{ROLLOUT}.enforce_eager",
    "max_num_batched_tokens": f"{ROLLOUT}.max_num_batched_tokens",
    "max_num_seqs": f"{ROLLOUT}.max_num_seqs",
    "max_model_len": f"{ROLLOUT}.max_model_len",
    "enable_chunked_prefill": f"{ROLLOUT}.enable_chunked_prefill",
    "disable_log_stats": f"{ROLLOUT}.disable_log_stats",
    "load_format": f"{ROLLOUT}.load_format",
    "enable_sleep_mode": f"{ROLLOUT}.free_cache_engine",
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


def engine_arguments(run: RunConfig, device_type: str) -> dict[str, Any]:
    """Give the keyword arguments of `vllm.LLM` that a configuration asks for on `cpu` or `cuda`.

    Raises:
        ConfigError: keys exclude each other, or `engine_kwargs` holds what has a key of its own.
    """
    rollout, model = run.rollout, run.actor.model
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
        **_memory(run, device_type),
        **FIXED,
        **(OVER_DEVICES if run.engine_devices > 1 else {}),
        **passed_on,
    }
    _check_lengths(rollout, arguments["max_model_len"])
    return arguments


def _memory(run: RunConfig, device_type: str) -> dict[str, Any]:
    rollout = run.rollout
    if device_type == "cpu":
        # There, a share of memory would be one of all memory, whoever uses it, and nothing can be put to sleep.
        return {"kv_cache_memory_bytes": CPU_CACHE_BYTES}
    return {
        "gpu_memory_utilization": rollout.gpu_memory_utilization,
        # Engines apart have their devices to themselves.
        "enable_sleep_mode": rollout.free_cache_engine and not run.trainer.rollout_devices,
    }


def _load_format(name: str) -> str:
    """`dummy_dtensor` and its like are vLLM's `dummy`: the trained weights follow before anything is generated."""
    if name.startswith("dummy"):
        return "dummy"
    return "auto" if name in CHECKPOINT_FORMATS else name


def _check_passed_on(passed_on: Mapping[str, Any]) -> None:
    for name in passed_on:
        where = f"{ROLLOUT}.engine_kwargs.vllm.{name}"
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
            f"{ROLLOUT}.max_model_len is {max_model_len}, and prompt and response together may have {needed} tokens "
            f"(data.max_prompt_length + data.max_response_length): raise it to {needed}, or set it to null"
        )
    if not rollout.enable_chunked_prefill and rollout.max_num_batched_tokens < max_model_len:
        raise ConfigError(
            f"{ROLLOUT}.max_num_batched_tokens is {rollout.max_num_batched_tokens}, and without enable_chunked_prefill "
            f"a whole sequence of {max_model_len} tokens must fit: raise it, or enable {ROLLOUT}.enable_chunked_prefill"
        )
    if rollout.max_num_batched_tokens < rollout.max_num_seqs:
        raise ConfigError(
            f"{ROLLOUT}.max_num_batched_tokens ({rollout.max_num_batched_tokens}) is below {ROLLOUT}.max_num_seqs "
            f"({rollout.max_num_seqs}), and each sequence needs a token: raise the one or lower the other"
        )
