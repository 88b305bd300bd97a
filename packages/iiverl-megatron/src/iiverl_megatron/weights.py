"""Weights from and to checkpoints of transformers, a tensor at a time.

Reading, every process takes from disk what it has a slice of. Giving, the slices of a parameter are gathered over the
processes that share it, and the whole goes to all pipeline stages; never more than one parameter is whole at once.
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
from iiverl_megatron.architecture import Architecture
from iiverl_megatron.checkpoint_files import CheckpointFiles
from iiverl_megatron.names import EXPERT, Entry, Sliced, Vocabulary, Whole, entry, order
from iiverl_megatron.parallel import expert_stages, stages, tensor_group

LOCAL_EXPERT = re.compile(
    r"mlp\.experts\.(?:local_experts\.(\d+)\.(linear_fc[12])\.weight|(linear_fc[12])\.weight(\d+))"
)


def global_parameters(chunks: Sequence[GPTModel]) -> dict[str, nn.Parameter]:
    """Give this process's parameters by global name, without the last stage's copy of a tied embedding."""
    return {
        _global_name(name, chunk): parameter
        for chunk in chunks
        for name, parameter in chunk.named_parameters()
        if not is_copy(chunk, parameter)
    }


def is_copy(chunk: GPTModel, parameter: nn.Parameter) -> bool:
    """Whether a parameter is the last stage's copy of the embedding, which has its own place in the first."""
    shared = chunk.share_embeddings_and_output_weights and chunk.post_process
    return shared and parameter is chunk.output_layer.weight


def _global_name(name: str, chunk: GPTModel) -> str:
    """Count layers and experts over the whole model, and call experts the same in all implementations."""
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
    """Fill every parameter of this process from the safetensors at `spec.model.path`.

    A critic takes over the head of a reward model or of a saved critic; where there is none its head starts at zero, so
    that nothing is made up and every run starts with the same.

    Raises:
        ConfigError: there is no such checkpoint, a weight is missing or of another shape, or a reward model has no head.
    """
    files = CheckpointFiles(spec)
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            found = entry(_global_name(name, chunk), architecture, spec.role)
            _fill(parameter, found, files, spec)


@torch.no_grad()
def _fill(parameter: nn.Parameter, found: Entry, files: CheckpointFiles, spec: ModelSpec) -> None:
    rank, size = _slice_of(found)
    tensors = [files.read(name) for name in found.names]
    present = [tensor for tensor in tensors if tensor is not None]
    if len(present) < len(tensors):
        missing = found.names[tensors.index(None)]
        if spec.role == "critic" and missing.startswith("score."):
            parameter.zero_()
            return
        files.refuse_missing(missing)
    value = found.form.split(present, rank, size)
    if value.shape != parameter.shape:
        files.refuse_shape(found.names[0], present[0])
    parameter.copy_(value)
    if not isinstance(found.form, Whole) and not hasattr(parameter, "tensor_model_parallel"):
        # Layers mark their slices when they initialise them, which they are told not to do. What is not marked counts
        # once in the gradient's norm, not once a process.
        dim = found.form.dim if isinstance(found.form, Sliced) else 0
        set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=dim, stride=1)


def _slice_of(found: Entry) -> tuple[int, int]:
    if found.expert:
        return 0, 1
    return (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )


@dataclass(frozen=True)
class _Home:
    """Where a parameter lies: the process that has it, of those that are to get it, and the shape and dtype of its slice."""

    rank: int
    shape: torch.Size
    dtype: torch.dtype


def named_tensors(
    chunks: Sequence[GPTModel],
    architecture: Architecture,
    role: Role,
    take: Callable[[nn.Parameter], Tensor],
) -> Iterator[tuple[str, Tensor]]:
    """Give whole tensors by the names that checkpoints of transformers use, the same on every process.

    `take` gives of a parameter what is asked for: its value, or its gradient. All processes take part in each.
    """
    own = {name: take(parameter).detach() for name, parameter in global_parameters(chunks).items()}
    device = next(chunks[0].parameters()).device
    homes = _all_homes(own)
    for name in sorted(homes, key=order):
        found, home = entry(name, architecture, role), homes[name]
        one = _is_one(found)
        slices = torch.empty(
            1 if one else tensor_group().size(), *home.shape, dtype=home.dtype, device=device
        )
        if name in own and one:
            slices[0] = own[name]
        elif name in own:
            dist.all_gather_into_tensor(slices.flatten(0, 1), own[name].contiguous(), group=tensor_group())
        dist.broadcast(slices, src=home.rank, group=expert_stages() if found.expert else stages())
        yield from zip(found.names, found.form.join(slices.unbind()), strict=True)


def count_parameters(chunks: Sequence[GPTModel], architecture: Architecture, role: Role) -> int:
    """Count the parameters of the whole model; tied weights count once. All processes take part."""
    total = 0
    for name, home in _all_homes(global_parameters(chunks)).items():
        found = entry(name, architecture, role)
        rows = home.shape[0] if _is_one(found) else home.shape[0] * tensor_group().size()
        if isinstance(found.form, Vocabulary):
            rows = found.form.tokens
        total += rows * home.shape[1:].numel()
    return total


def _is_one(found: Entry) -> bool:
    """Whether a parameter is whole on every process that has it."""
    return found.expert or isinstance(found.form, Whole)


def _all_homes(own: Mapping[str, Tensor]) -> dict[str, _Home]:
    """Say where each parameter of the whole model lies, the same on every process but for which copy it is told of."""
    homes = _homes({name: value for name, value in own.items() if not EXPERT.fullmatch(name)}, stages())
    return homes | _homes(
        {name: value for name, value in own.items() if EXPERT.fullmatch(name)}, expert_stages()
    )


def _homes(own: Mapping[str, Tensor], group: dist.ProcessGroup) -> dict[str, _Home]:
    known: list[Any] = [None] * dist.get_world_size(group)
    mine = {name: (value.shape, value.dtype) for name, value in own.items()}
    dist.all_gather_object(known, mine, group=group)
    return {
        name: _Home(dist.get_global_rank(group, rank), *what)
        for rank, theirs in enumerate(known)
        for name, what in theirs.items()
    }
