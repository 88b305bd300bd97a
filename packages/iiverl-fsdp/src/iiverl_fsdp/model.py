"""Building a sharded causal LM: on the meta device everywhere, read from disk once, scattered to all."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils.import_utils import is_flash_attn_2_available

from iiverl_core.config import FSDPConfig
from iiverl_core.dtypes import torch_dtype
from iiverl_core.errors import ConfigError
from iiverl_core.training import ModelSpec


def build_sharded(spec: ModelSpec) -> PreTrainedModel:
    """Build the model of `spec` over all processes.

    Only the first process reads the weights; each keeps its shard. Dropout is off: the log-probs of a response must be
    the same each time they are asked for.

    Raises:
        ConfigError: there is no causal LM at `spec.model.path`.
    """
    parallel = spec.parallel
    if not isinstance(parallel, FSDPConfig):
        raise TypeError(f"FSDP reads fsdp_config, not {type(parallel).__name__}")
    # FSDP2 moves weights, gradients and the optimizer's state together.
    offload = parallel.param_offload or parallel.optimizer_offload
    config = _model_config(spec, half=parallel.mixed_precision.param_dtype not in ("fp32", "float32"))
    dtype = torch_dtype(parallel.model_dtype or spec.default_dtype)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if spec.model.enable_gradient_checkpointing and spec.optim is not None:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.train()

    _shard(model, parallel, spec.device, offload)
    model.to_empty(device="cpu" if offload else spec.device)
    _load(model, spec, config, dtype)
    return model


def _model_config(spec: ModelSpec, *, half: bool) -> PreTrainedConfig:
    """Read the model's configuration, with dropout off and the attention that suits the device and dtype."""
    try:
        config = AutoConfig.from_pretrained(
            spec.model.path, trust_remote_code=spec.model.trust_remote_code, **spec.model.override_config
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"no model can be read from '{spec.model.path}' ({spec.role}): {error}") from error
    for name in ("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    flash = half and spec.device.type == "cuda" and is_flash_attn_2_available()  # its kernels know no fp32
    config._attn_implementation = "flash_attention_2" if flash else "sdpa"
    return config


def _shard(model: PreTrainedModel, parallel: FSDPConfig, device: torch.device, offload: bool) -> None:
    """Shard each transformer block, and what is left (embeddings, head, last norm) as one more group."""
    precision = parallel.mixed_precision
    options: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (dist.get_world_size(),)),
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=torch_dtype(precision.param_dtype), reduce_dtype=torch_dtype(precision.reduce_dtype)
        ),
        "offload_policy": CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy(),
    }
    blocks = set(model._no_split_modules or ())
    for module in list(model.modules()):
        if type(module).__name__ in blocks:
            fully_shard(module, **options)
    fully_shard(model, **options)


def _load(model: PreTrainedModel, spec: ModelSpec, config: PreTrainedConfig, dtype: torch.dtype) -> None:
    """Read the weights on the first process and give each process its part, and all of the buffers."""
    state: dict[str, Any] = {}
    buffers: dict[str, torch.Tensor] = {}
    if dist.get_rank() == 0:
        path = Path(spec.model.path).expanduser()
        try:
            source = AutoModelForCausalLM.from_pretrained(
                path if path.exists() else spec.model.path,
                config=config,
                dtype=dtype,
                trust_remote_code=spec.model.trust_remote_code,
            )
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"no weights can be read from '{spec.model.path}' ({spec.role}): {error}"
            ) from error
        state, buffers = dict(source.state_dict()), dict(source.named_buffers())
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=True)
    set_model_state_dict(model, state, options=options)
    # Buffers that are not saved (rotary frequencies) exist only in a model that was built for real.
    for name, buffer in model.named_buffers():
        value = (
            buffers[name].to(spec.device)
            if dist.get_rank() == 0
            else torch.empty_like(buffer, device=spec.device)
        )
        dist.broadcast(value, src=0)
        buffer.data = value
    model.tie_weights()
