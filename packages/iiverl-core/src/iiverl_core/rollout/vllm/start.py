"""Starting vLLM, and what it says when it cannot run a model, in terms of the run's configuration."""

import warnings
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from pydantic import ValidationError

from iiverl_core.config import ROLLOUT
from iiverl_core.errors import ConfigError
from iiverl_core.rollout.vllm.arguments import OWN

BACKEND = "iiverl"  # of vLLM's weight transfer; see `transfer`

HINTS = {
    "max_model_len": f"set {ROLLOUT}.max_model_len (or data.max_prompt_length and data.max_response_length) lower",
    "tensor parallel size": f"set {ROLLOUT}.tensor_model_parallel_size lower",
    "memory": f"change {ROLLOUT}.gpu_memory_utilization",
    "architectures": f"set {ROLLOUT}.name to hf, or {OWN['model']} to another model",
}


def start(vllm: ModuleType, arguments: Mapping[str, Any], *, colocated: bool) -> Any:
    """Start `vllm.LLM`, ready to be given weights; `colocated` says that the model is trained in this process as well.

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
            return vllm.LLM(**arguments, weight_transfer_config=WeightTransferConfig(backend=BACKEND))
    except (ValueError, TypeError, NotImplementedError) as error:
        reason = _reason(error)
        hint = next(
            (hint for word, hint in HINTS.items() if word in reason), f"see {ROLLOUT} for its settings"
        )
        raise ConfigError(f"vLLM cannot start with the model '{path}': {reason}; {hint}") from error


def _reason(error: Exception) -> str:
    """Give the first sentence of what vLLM says, which may be wrapped by the validation of its settings."""
    said = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
    return said.removeprefix("Value error, ").split(". ")[0].split("\n")[0]


def _check_own_model(model_config: Any, path: str) -> None:
    """See that vLLM will not run transformers' model.

    It would put its own `__init__` and `__call__` on transformers' class, for compiling, and they want of every model of
    that class, the trained one too, what vLLM gives to its own alone.
    """
    if model_config.using_transformers_backend():
        raise ConfigError(
            f"vLLM has no model of its own for '{path}' ({OWN['model']}) and runs that of transformers, "
            "which it changes for the whole process: the model cannot be trained there. Set trainer.rollout_devices, "
            f"so that engines have processes of their own, or set {ROLLOUT}.name to hf"
        )


def _check_head_size(model_config: Any, path: str) -> None:
    """On a CPU, vLLM finds out about heads that it cannot do at the first prompt."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    size, sizes = model_config.get_head_size(), CPUAttentionBackend.get_supported_head_sizes()
    if size not in sizes:
        raise ConfigError(
            f"vLLM on a CPU cannot run the model '{path}' ({OWN['model']}): its attention heads are {size} "
            f"wide, and there have to be {', '.join(map(str, sizes))}. Set {ROLLOUT}.name to hf"
        )
