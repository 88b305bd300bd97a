"""Read and export weights by the names of transformers checkpoints, one tensor at a time.

To read, every process reads the tensors of which it has a slice. To export, the slices of a parameter are gathered over
the processes that share it and broadcast to all pipeline stages, one parameter at a time.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from iiverl_core.training import ModelSpec, Role
from iiverl_core.training.adapter import A, B, chosen_layers, is_adapter, starting_adapter
from iiverl_megatron.architecture import Architecture
from iiverl_megatron.checkpoint_files import CheckpointFiles
from iiverl_megatron.names import (
    EXPERT,
    Replicated,
    Sliced,
    Vocabulary,
    WeightMapping,
    sort_key,
    weight_mapping,
)
from iiverl_megatron.parallel import expert_pipeline_group, pipeline_group, tensor_group

LOCAL_EXPERT = re.compile(
    r"mlp\.experts\.(?:local_experts\.(\d+)\.(linear_fc[12])\.weight|(linear_fc[12])\.weight(\d+))"
)


def global_parameters(chunks: Sequence[GPTModel]) -> dict[str, nn.Parameter]:
    """Return this process's parameters by global name, without the last stage's copy of a tied embedding."""
    return {
        global_name(name, chunk): parameter
        for chunk in chunks
        for name, parameter in chunk.named_parameters()
        if not is_copy(chunk, parameter)
    }


def is_copy(chunk: GPTModel, parameter: nn.Parameter) -> bool:
    """Whether a parameter is the last stage's copy of the first stage's embedding."""
    shared = chunk.share_embeddings_and_output_weights and chunk.post_process
    return shared and parameter is chunk.output_layer.weight


def global_name(name: str, chunk: GPTModel) -> str:
    """Number layers and experts over the whole model; experts have one name in all implementations."""
    found = re.fullmatch(r"decoder\.layers\.(\d+)\.(.*)", name)
    if found is None:
        return name
    layer = cast(TransformerLayer, chunk.decoder.layers[int(found[1])]).layer_number - 1
    rest = found[2]
    if expert := LOCAL_EXPERT.fullmatch(rest):
        config = chunk.config
        here = (config.num_moe_experts or 0) // config.expert_model_parallel_size
        number = int(expert[1] or expert[4]) + here * parallel_state.get_expert_model_parallel_rank()
        rest = f"mlp.experts.{number}.{expert[2] or expert[3]}.weight"
    return f"decoder.layers.{layer}.{rest}"


def read_weights(spec: ModelSpec, chunks: Sequence[GPTModel], architecture: Architecture) -> None:
    """Fill every parameter of this process from the safetensors at `spec.model.path`, and from the adapter to start from.

    A critic uses the head of a reward model or of a saved critic. If there is none its head starts at zero, so that every
    run starts with the same values.

    Raises:
        ConfigError: there is no such checkpoint, a weight is missing or of another shape, a reward model has no head, or
            the adapter does not fit.
    """
    files, adapter = CheckpointFiles(spec), _starting_adapter(spec, architecture)
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            mapping = weight_mapping(global_name(name, chunk), architecture, spec.role)
            _fill(parameter, mapping, adapter.get if is_adapter(name) else files.read, files, spec)


def _starting_adapter(spec: ModelSpec, architecture: Architecture) -> dict[str, Tensor]:
    if not spec.model.lora_rank:
        return {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name in chosen_layers(spec.model, architecture.linear_layers):
        inputs, outputs = architecture.linear_layers[name]
        shapes[f"{name}.{A}.weight"] = (spec.model.lora_rank, inputs)
        shapes[f"{name}.{B}.weight"] = (outputs, spec.model.lora_rank)
    return starting_adapter(spec.model, shapes)


@torch.no_grad()
def _fill(
    parameter: nn.Parameter,
    mapping: WeightMapping,
    read: Callable[[str], Tensor | None],
    files: CheckpointFiles,
    spec: ModelSpec,
) -> None:
    rank, size = _slice_of(mapping)
    tensors = [read(name) for name in mapping.names]
    present = [tensor for tensor in tensors if tensor is not None]
    if len(present) < len(tensors):
        missing = mapping.names[tensors.index(None)]
        if spec.role == "critic" and missing.startswith("score."):
            parameter.zero_()
            return
        files.refuse_missing(missing)
    value = mapping.sharding.split(present, rank, size)
    if value.shape != parameter.shape:
        files.refuse_shape(mapping.names[0], present[0])
    parameter.copy_(value)
    if not isinstance(mapping.sharding, Replicated) and not hasattr(parameter, "tensor_model_parallel"):
        # Layers mark their slices when they initialise them, which is switched off. Unmarked parameters count once in
        # the gradient's norm, not once per process.
        dim = mapping.sharding.dim if isinstance(mapping.sharding, Sliced) else 0
        set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=dim, stride=1)


def _slice_of(mapping: WeightMapping) -> tuple[int, int]:
    if mapping.expert:
        return 0, 1
    return (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )


@dataclass(frozen=True)
class _Owner:
    """The process that broadcasts a parameter, and the shape and dtype of its slice."""

    rank: int
    shape: torch.Size
    dtype: torch.dtype


def whole_tensors(
    own: Mapping[str, Tensor],
    architecture: Architecture,
    role: Role,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[str, WeightMapping, list[Tensor]]]:
    """Yield the whole tensors of each parameter by global name, the same on every process.

    `own` has this process's slices of values or gradients, which are converted to `dtype`, if given, before they are
    gathered. All processes take part in each parameter. Adapters precede the weights of their layer.
    """
    owners = _all_owners(own)
    for name in sorted(owners, key=sort_key):
        mapping, owner = weight_mapping(name, architecture, role), owners[name]
        replicated = _is_replicated(mapping)
        slices = torch.empty(
            1 if replicated else tensor_group().size(),
            *owner.shape,
            dtype=dtype or owner.dtype,
            device=device,
        )
        if name in own and replicated:
            slices[0] = own[name]
        elif name in own:
            part = own[name].to(slices.dtype).contiguous()
            dist.all_gather_into_tensor(slices.flatten(0, 1), part, group=tensor_group())
        dist.broadcast(
            slices, src=owner.rank, group=expert_pipeline_group() if mapping.expert else pipeline_group()
        )
        yield name, mapping, mapping.sharding.join(slices.unbind())


def count_parameters(own: Mapping[str, Tensor], architecture: Architecture, role: Role) -> int:
    """Count the numbers in the whole parameters of which processes have `own`. All processes take part."""
    total = 0
    for name, owner in _all_owners(own).items():
        mapping = weight_mapping(name, architecture, role)
        rows = owner.shape[0] if _is_replicated(mapping) else owner.shape[0] * tensor_group().size()
        if isinstance(mapping.sharding, Vocabulary):
            rows = mapping.sharding.tokens
        total += rows * owner.shape[1:].numel()
    return total


def _is_replicated(mapping: WeightMapping) -> bool:
    """Whether every process that has a parameter has all of it."""
    return mapping.expert or isinstance(mapping.sharding, Replicated)


def _all_owners(own: Mapping[str, Tensor]) -> dict[str, _Owner]:
    """Return an owner of each parameter of the whole model; processes may learn of different copies."""
    owners = _owners(
        {name: value for name, value in own.items() if not EXPERT.fullmatch(name)}, pipeline_group()
    )
    return owners | _owners(
        {name: value for name, value in own.items() if EXPERT.fullmatch(name)}, expert_pipeline_group()
    )


def _owners(own: Mapping[str, Tensor], group: dist.ProcessGroup) -> dict[str, _Owner]:
    known: list[Any] = [None] * dist.get_world_size(group)
    mine = {name: (value.shape, value.dtype) for name, value in own.items()}
    dist.all_gather_object(known, mine, group=group)
    return {
        name: _Owner(dist.get_global_rank(group, rank), *what)
        for rank, theirs in enumerate(known)
        for name, what in theirs.items()
    }
