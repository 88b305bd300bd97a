"""Importing and starting vLLM, and its errors in terms of the run's configuration."""

import logging
import os
import warnings
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from pydantic import ValidationError

from iiverl_core.config import ROLLOUT
from iiverl_core.config.vllm import installed_version, version_problem
from iiverl_core.errors import ConfigError
from iiverl_core.rollout.vllm.arguments import KEY_OF_ARGUMENT

LOWEST_TEMPERATURE = 0.01  # vLLM raises lower temperatures to this one

ENVIRONMENT = {
    # The engine lives in the worker's process: nothing is spawned, and weights are handed over without a copy.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the process trains too: its threads stay where they are
    # Under Ray a process sees only its own device, so all-reduces that read other devices' memory fail or hang. Use NCCL.
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "VLLM_ALLREDUCE_USE_FLASHINFER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
BACKEND = "iiverl"  # of vLLM's weight transfer; see `transfer`

HINTS = {
    "max_model_len": f"set {ROLLOUT}.max_model_len (or data.max_prompt_length and data.max_response_length) lower",
    "tensor parallel size": f"set {ROLLOUT}.tensor_model_parallel_size lower",
    "memory": f"change {ROLLOUT}.gpu_memory_utilization",
    "No module named": "install vLLM with what it needs: pip install 'iiverl[vllm]'",
    "architectures": f"set {ROLLOUT}.name to hf, or {KEY_OF_ARGUMENT['model']} to another model",
}


def import_vllm() -> ModuleType:
    """Check the version, set the environment variables that the user did not set, and import vLLM.

    Raises:
        ConfigError: vLLM is missing, not supported, or cannot be imported.
    """
    if problem := version_problem(installed_version()):
        raise ConfigError(problem)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", category=FutureWarning)  # of vLLM's own use of torch
            import vllm
    except (ImportError, OSError) as error:
        raise ConfigError(
            f"vLLM is installed and cannot be imported: {error}. Was it built for another torch or another device?"
        ) from error
    # vLLM sets its level when an engine is made, and logs before that.
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"].upper())
    return vllm


def start(vllm: ModuleType, arguments: Mapping[str, Any], *, colocated: bool) -> Any:
    """Start `vllm.LLM`, ready for weights; `colocated` if the model is trained in this process as well.

    Raises:
        ConfigError: vLLM cannot run the model with these arguments, or not in a process that trains it.
    """
    from vllm.config import WeightTransferConfig

    path = arguments["model"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", category=FutureWarning)  # of vLLM's own use of torch
            model_config = vllm.EngineArgs(**arguments).create_model_config()
            if colocated:
                _check_own_model(model_config, path)
            if vllm.platforms.current_platform.is_cpu():
                _check_head_size(model_config, path)
                _check_experts(model_config, arguments, path)
            return vllm.LLM(**arguments, weight_transfer_config=WeightTransferConfig(backend=BACKEND))
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        reason = _reason(error)
        hint = next(
            (hint for word, hint in HINTS.items() if word in reason), f"see {ROLLOUT} for its settings"
        )
        raise ConfigError(f"vLLM cannot start with the model '{path}': {reason}; {hint}") from error


def _reason(error: Exception) -> str:
    """Return the first sentence of vLLM's message, without what pydantic puts around it."""
    message = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
    return message.removeprefix("Value error, ").split(". ")[0].split("\n")[0]


def _check_own_model(model_config: Any, path: str) -> None:
    """Check that vLLM does not run transformers' model.

    To compile it, vLLM would replace `__init__` and `__call__` of transformers' class, and so break the trained model,
    which is of the same class.
    """
    if model_config.using_transformers_backend():
        raise ConfigError(
            f"vLLM has no model of its own for '{path}' ({KEY_OF_ARGUMENT['model']}) and runs that of transformers, "
            "which it changes for the whole process: the model cannot be trained there. Set trainer.rollout_devices, "
            f"so that engines have processes of their own, or set {ROLLOUT}.name to hf"
        )


def _check_experts(model_config: Any, arguments: Mapping[str, Any], path: str) -> None:
    """Check that a mixture of experts has no LoRA adapters, which vLLM on a CPU would refuse only at the first prompt."""
    if arguments.get("enable_lora") and model_config.is_moe:
        raise ConfigError(
            f"vLLM on a CPU cannot run the mixture of experts '{path}' with LoRA adapters beside its weights: set "
            f"{KEY_OF_ARGUMENT['enable_lora']} to merged"
        )


def _check_head_size(model_config: Any, path: str) -> None:
    """Check the size of attention heads, which vLLM on a CPU refuses only at the first prompt."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    size, sizes = model_config.get_head_size(), CPUAttentionBackend.get_supported_head_sizes()
    if size not in sizes:
        raise ConfigError(
            f"vLLM on a CPU cannot run the model '{path}' ({KEY_OF_ARGUMENT['model']}): its attention heads are {size} "
            f"wide; supported are {', '.join(map(str, sizes))}. Set {ROLLOUT}.name to hf"
        )
