"""vLLM's arguments from the configuration. Imports neither torch nor vLLM."""

from collections.abc import Mapping
from typing import Any

from iiverl_core.config import ROLE_KEYS, ROLLOUT, RolloutConfig, RunConfig
from iiverl_core.errors import ConfigError

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
CHECKPOINT_FORMATS = {"hf", "dtensor", "megatron"}  # the model's own files
MODEL = ROLE_KEYS["actor"].model
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # of which vLLM has room for one
CPU_CACHE_BYTES = 2**30  # for keys and values, in memory that is shared with training

KEY_OF_ARGUMENT = {
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
    "enable_prefix_caching": f"{ROLLOUT}.enable_prefix_caching",
    "disable_log_stats": f"{ROLLOUT}.disable_log_stats",
    "load_format": f"{ROLLOUT}.load_format",
    "enable_lora": f"{ROLLOUT}.lora_sync",
    "enable_sleep_mode": f"{ROLLOUT}.free_cache_engine",
}
"""The key of each argument that has one."""

EXECUTOR = "distributed_executor_backend"
FIXED = {
    "skip_tokenizer_init": True,  # token ids go in and out
    "generation_config": "vllm",  # sampling is configured by the run, not by the model's folder
    "logprobs_mode": "processed_logprobs",  # under the distribution that was sampled from
    "worker_extension_cls": "iiverl_core.rollout.vllm.worker.WorkerExtension",
}
"""Arguments that the engine depends on."""

WITH_IMAGES: dict[str, Any] = {
    "skip_tokenizer_init": False,  # without a tokenizer, vLLM starts no model that reads images
    "mm_device_do_normalize": False,  # images are given as the model's processor prepares them
    "mm_processor_cache_gb": 0,
    "limit_mm_per_prompt": {"video": 0},
}
"""Further ones for a model that reads images."""

OVER_DEVICES: dict[str, Any] = {
    EXECUTOR: "iiverl_core.rollout.vllm.worker.GroupExecutor",
    "disable_custom_all_reduce": True,  # this and the next need each process to see the others' devices
    "compilation_config": {"pass_config": {"fuse_allreduce_rms": False}},
}
"""Further ones for an engine over several devices, with a process on each."""


def engine_arguments(run: RunConfig, device_type: str) -> dict[str, Any]:
    """Return the keyword arguments of `vllm.LLM` for a configuration, on `cpu` or `cuda`.

    Raises:
        ConfigError: keys contradict each other, or `engine_kwargs` holds an argument that has a key of its own.
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
        "enforce_eager": rollout.enforce_eager or device_type == "cpu",
        "max_num_batched_tokens": rollout.max_num_batched_tokens,
        "max_num_seqs": rollout.max_num_seqs,
        "max_model_len": rollout.max_model_len or rollout.prompt_length + rollout.response_length,
        "enable_chunked_prefill": rollout.enable_chunked_prefill,
        "disable_log_stats": rollout.disable_log_stats,
        "load_format": _load_format(rollout.load_format),
        "enable_prefix_caching": rollout.enable_prefix_caching,
        **_memory(run, device_type),
        **_adapters(run),
        # Which tokens top-k and top-p kept, for the trainer to compute over the same ones.
        "return_sampling_mask": device_type != "cpu" and _truncates(rollout),
        **FIXED,
        **(OVER_DEVICES if run.engine_devices > 1 else {}),
        **passed_on,
    }
    compilation = passed_on.get("compilation_config")
    if run.engine_devices > 1 and isinstance(
        compilation, dict
    ):  # beside the options that the engine depends on
        fixed = OVER_DEVICES["compilation_config"]["pass_config"]
        passes = {**compilation.get("pass_config", {}), **fixed}
        arguments["compilation_config"] = {**compilation, "pass_config": passes}
    _check_lengths(rollout, arguments["max_model_len"])
    return arguments


def _memory(run: RunConfig, device_type: str) -> dict[str, Any]:
    rollout = run.rollout
    if device_type == "cpu":
        # vLLM would take a fraction of all memory, whoever uses it, and cannot sleep on a CPU.
        return {"kv_cache_memory_bytes": CPU_CACHE_BYTES}
    return {
        "gpu_memory_utilization": rollout.gpu_memory_utilization,
        # Engines in processes of their own have their devices to themselves.
        "enable_sleep_mode": rollout.free_cache_engine and not run.trainer.rollout_devices,
    }


def _truncates(rollout: RolloutConfig) -> bool:
    return rollout.do_sample and (rollout.top_k > 0 or rollout.top_p < 1)


def _adapters(run: RunConfig) -> dict[str, Any]:
    if not run.syncs_adapters:
        return {}
    room = min(rank for rank in RANKS if rank >= run.actor.model.lora_rank)
    return {"enable_lora": True, "max_loras": 1, "max_cpu_loras": 1, "max_lora_rank": room}


def _load_format(name: str) -> str:
    """Map `dummy_dtensor` and the like to `dummy`: weights are updated before anything is generated."""
    if name.startswith("dummy"):
        return "dummy"
    return "auto" if name in CHECKPOINT_FORMATS else name


def _check_passed_on(passed_on: Mapping[str, Any]) -> None:
    for name in passed_on:
        where = f"{ROLLOUT}.engine_kwargs.vllm.{name}"
        if name in KEY_OF_ARGUMENT:
            raise ConfigError(f"{where} has a key of its own: set {KEY_OF_ARGUMENT[name]} instead")
        if name in FIXED:
            raise ConfigError(f"{where} is decided by the engine ({FIXED[name]}): remove it")
        if name == EXECUTOR:
            raise ConfigError(f"{where} is decided by {KEY_OF_ARGUMENT['tensor_parallel_size']}: remove it")


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
            f"({rollout.max_num_seqs}), and each sequence needs a token: raise the first or lower the second"
        )
