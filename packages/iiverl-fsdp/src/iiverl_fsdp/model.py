"""Build a sharded model: on the meta device everywhere, read from disk once, scattered to all processes.

Actor and reference are built by `policy_model`, critic and reward model by `value_model`.
"""

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from iiverl_core.config import ROLE_KEYS, FSDPConfig
from iiverl_core.dtypes import torch_dtype
from iiverl_core.errors import ConfigError
from iiverl_core.training import LayoutKind, ModelSpec, Role
from iiverl_core.training.adapter import add_adapter, is_adapter, starting_adapter
from iiverl_core.training.model_config import read_model_config
from iiverl_core.training.vision import reads_images, vision_tower
from iiverl_fsdp.attention import PADDED
from iiverl_fsdp.packing import attention_candidates, choose_layout
from iiverl_fsdp.policy_model import PolicyModel, build_policy_model, probe_head, read_policy_model
from iiverl_fsdp.value_model import ValueModel, build_value_model, read_value_model

ShardedModel: TypeAlias = PolicyModel | ValueModel


BUILDERS: dict[Role, tuple[Callable[..., ShardedModel], Callable[..., ShardedModel]]] = {
    "actor": (build_policy_model, read_policy_model),
    "reference": (build_policy_model, read_policy_model),
    "critic": (build_value_model, read_value_model),
    "reward": (build_value_model, read_value_model),
}
"""For each role: the function that builds its model without weights, and the one that reads it from disk."""


def build_sharded(spec: ModelSpec) -> tuple[ShardedModel, LayoutKind]:
    """Build the model of `spec` over all processes, and choose the layout of its inputs.

    Only the first process reads the weights; each keeps its shard. Dropout is off: the log-probs of a response must not
    change from one pass to the next.

    Raises:
        ConfigError: there is no model for this role at `spec.model.path`, or it does not support packing, which is
            demanded.
    """
    parallel = parallel_config(spec)
    # FSDP2 moves weights, gradients and the optimizer's state together.
    offload = spec.offload.parameters or spec.offload.optimizer
    model, config, dtype = _build_empty(spec)
    _check_heads(spec, config)
    _, read = BUILDERS[spec.role]
    if spec.model.enable_gradient_checkpointing and spec.optim is not None:
        _enable_checkpointing(transformer(model))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.train()
    candidates = attention_candidates(transformer(model), spec)

    _shard(model, parallel, spec.device, offload)
    model.to_empty(device="cpu" if offload else spec.device)
    _load(model, spec, lambda: read(spec, config, dtype))
    if isinstance(model, PolicyModel):
        probe_head(model, spec)
    layout = choose_layout(model, transformer(model), candidates, spec)
    reshard(model)  # an optimizer built now would step the gathered copies of the root's weights
    return model, layout


def reshard(model: nn.Module) -> None:
    """Free gathered weights that FSDP keeps after a forward pass for the backward pass: the root's, or all."""
    _sharded(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def set_gradient_sync(model: nn.Module, sync: bool) -> None:
    """Let the next backward passes reduce gradients over devices, with those kept from earlier passes, or keep them."""
    _sharded(model).set_requires_gradient_sync(sync)


def _sharded(model: nn.Module) -> FSDPModule:
    """Return a model of whose methods some are FSDP's."""
    if not isinstance(model, FSDPModule):
        raise TypeError(f"{type(model).__name__} is not sharded")
    return model


def build_empty(spec: ModelSpec) -> ShardedModel:
    """Build the model of `spec` without storage.

    Raises:
        ConfigError: there is no model for this role at `spec.model.path`.
    """
    return _build_empty(spec)[0]


def _build_empty(spec: ModelSpec) -> tuple[ShardedModel, PreTrainedConfig, torch.dtype]:
    parallel = parallel_config(spec)
    config = _model_config(spec)
    dtype = torch_dtype(parallel.model_dtype or spec.default_dtype)
    build, _ = BUILDERS[spec.role]
    if reads_images(config) and spec.sequence_split > 1:
        raise ConfigError(
            f"the {spec.role} model '{spec.model.path}' reads images: its sequences cannot be split over devices yet"
        )
    try:
        with torch.device("meta"):
            model = build(spec, config, dtype)
            frozen = None
            if spec.freeze_vision_tower and reads_images(config):
                frozen = vision_tower(transformer(model)).requires_grad_(False)
            add_adapter(model, spec.model, head_of(model), frozen)
            if isinstance(model, ValueModel) and spec.model.lora_rank:
                model.head_module.float().requires_grad_(True)
            return model, config, dtype
    except ValueError as error:
        raise ConfigError(f"no {spec.role} model can be built from '{spec.model.path}': {error}") from error


def starting_weights(spec: ModelSpec) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights that a run starts from, by the names of the model of `build_empty`, tied ones once.

    Raises:
        ConfigError: there are none at `spec.model.path`.
    """
    _, config, dtype = _build_empty(spec)
    _, read = BUILDERS[spec.role]
    model = _read(spec, lambda: read(spec, config, dtype))
    yield from ((name, parameter.detach()) for name, parameter in model.named_parameters())


def split_joined(model: nn.Module, name: str, value: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Split a tensor that transformers joins, such as experts, into those of a checkpoint."""
    whole = {name: value}
    if isinstance(model, PolicyModel):
        whole = revert_weight_conversion(model.language_model, whole)
    yield from whole.items()


def parallel_config(spec: ModelSpec) -> FSDPConfig:
    """Return the layout of a model, which is FSDP's."""
    if not isinstance(spec.parallel, FSDPConfig):
        raise TypeError(f"FSDP reads fsdp_config, not {type(spec.parallel).__name__}")
    return spec.parallel


def transformer(model: ShardedModel) -> PreTrainedModel:
    """Return the model of transformers in a model."""
    return model.backbone_module if isinstance(model, ValueModel) else model.language_model


def _check_heads(spec: ModelSpec, config: PreTrainedConfig) -> None:
    """Raise ConfigError if heads cannot be divided over the devices that share a sequence."""
    if spec.sequence_split == 1:
        return
    heads = config.get_text_config().num_attention_heads
    if heads % spec.sequence_split:
        raise ConfigError(
            f"the {spec.role} model '{spec.model.path}' has {heads} attention heads, which cannot be divided over "
            f"{spec.sequence_split} devices: set its ulysses_sequence_parallel_size to a divisor of {heads}"
        )


def head_of(model: ShardedModel) -> nn.Module | None:
    """Return the layer after the last hidden state, which has no adapter."""
    return model.head_module if isinstance(model, ValueModel) else transformer(model).get_output_embeddings()


def _enable_checkpointing(model: PreTrainedModel) -> None:
    """Recompute activations in the backward pass; transformers 5.23 renamed the method that does it."""
    renamed = getattr(model, "activation_checkpointing_enable", None)
    (renamed or model.gradient_checkpointing_enable)({"use_reentrant": False})


def _model_config(spec: ModelSpec) -> PreTrainedConfig:
    """Read the model's configuration, without dropout."""
    model = spec.model
    config = read_model_config(
        model.path,
        model.override_config,
        trust_remote_code=model.trust_remote_code,
        key=ROLE_KEYS[spec.role].model,
    )
    # Architectures have different names for dropout: attention_dropout, resid_pdrop, activation_dropout, layerdrop, …
    parts = [getattr(config, name) for name in config.sub_configs]
    for part in (config, config.get_text_config(), *(part for part in parts if part is not None)):
        for name, value in list(vars(part).items()):
            if "drop" in name and isinstance(value, float):
                setattr(part, name, 0.0)
    config._attn_implementation = PADDED
    return config


def _shard(model: ShardedModel, parallel: FSDPConfig, device: torch.device, offload: bool) -> None:
    """Shard each transformer block, and what is left (embeddings, head, last norm) as one more group.

    The head of a `ValueModel` is a group of its own, which computes in fp32 or wider whatever the rest does: in bf16
    its output would be rounded to 8 bits.
    """
    precision = parallel.mixed_precision
    param_dtype, reduce_dtype = torch_dtype(precision.param_dtype), torch_dtype(precision.reduce_dtype)
    options: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (dist.get_world_size(),)),
        "mp_policy": MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype),
        "offload_policy": CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy(),
    }
    blocks = set(transformer(model)._no_split_modules or ())
    for module in list(model.modules()):
        if type(module).__name__ in blocks:
            fully_shard(module, reshard_after_forward=parallel.reshard_after_forward, **options)
    if isinstance(model, ValueModel):
        wide = MixedPrecisionPolicy(
            param_dtype=torch.promote_types(param_dtype, torch.float32), reduce_dtype=reduce_dtype
        )
        fully_shard(model.head_module, **{**options, "mp_policy": wide})
    fully_shard(model, **options)


def _read(spec: ModelSpec, read: Callable[[], ShardedModel]) -> ShardedModel:
    try:
        return read()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no weights can be read from '{spec.model.path}' ({spec.role}): {error}"
        ) from error


def _adapter(model: ShardedModel, spec: ModelSpec) -> dict[str, torch.Tensor]:
    """Return the adapter that the run starts from, or one without effect."""
    shapes = {
        name: tuple(parameter.shape) for name, parameter in model.named_parameters() if is_adapter(name)
    }
    return starting_adapter(spec.model, shapes)


def _load(model: ShardedModel, spec: ModelSpec, read: Callable[[], ShardedModel]) -> None:
    """Read the weights on the first process, scatter shards and broadcast buffers."""
    state: dict[str, Any] = {}
    buffers: dict[str, torch.Tensor] = {}
    if dist.get_rank() == 0:
        source = _read(spec, read)
        state, buffers = dict(source.state_dict()), dict(source.named_buffers())
        state |= _adapter(model, spec)
        state |= {name: state[name].to(parameter.dtype) for name, parameter in model.named_parameters()}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=True)
    set_model_state_dict(model, state, options=options)
    # Buffers that are not saved (rotary frequencies) are not computed on the meta device.
    for name, buffer in model.named_buffers():
        value = (
            buffers[name].to(spec.device)
            if dist.get_rank() == 0
            else torch.empty_like(buffer, device=spec.device)
        )
        dist.broadcast(value, src=0)
        buffer.data = value
    transformer(model).tie_weights()
