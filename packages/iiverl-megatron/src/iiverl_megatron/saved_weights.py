"""Read the weights of a checkpoint by the names of transformers checkpoints, one tensor at a time, from any layout.

A model without storage tells which part of which saved tensor each of its parameters is.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from torch import Tensor

from iiverl_core.config import MegatronConfig
from iiverl_core.training import ModelSpec
from iiverl_core.training.adapter import is_adapter, merge_saved
from iiverl_core.training.saved_tensors import SavedTensors
from iiverl_megatron.architecture import Architecture, read_architecture
from iiverl_megatron.checkpoint import sharded_weights
from iiverl_megatron.checkpoint_files import CheckpointFiles
from iiverl_megatron.model import build_chunks
from iiverl_megatron.names import sort_key, weight_mapping
from iiverl_megatron.parallel import init_parallel
from iiverl_megatron.weights import global_name, is_copy

WHOLE = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "context_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "sequence_parallel": False,
}
"""The layout of a model in one process."""


def saved_weights(
    spec: ModelSpec, parallel: MegatronConfig, folder: Path, *, adapter: bool
) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights that `checkpoint.save` wrote into `folder`. This process is a group of its own.

    LoRA adapters are merged into the weights that the run started from, unless only what was trained is asked for (`adapter`).

    Raises:
        CheckpointError: `folder` holds no checkpoint of this model.
    """
    saved, parallel = SavedTensors(folder), parallel.model_copy(update=WHOLE)
    init_parallel(parallel)
    architecture = read_architecture(spec, parallel)
    with torch.device("meta"):
        (chunk,) = build_chunks(replace(spec, device=torch.device("meta")), parallel, architecture)
        places = sharded_weights(chunk)
    parameters = {name: each for name, each in chunk.named_parameters() if not is_copy(chunk, each)}
    names = {global_name(name, chunk): name for name in parameters}

    def trained() -> Iterator[tuple[str, Tensor]]:
        for name in sorted(names, key=sort_key):
            if names[name] in places:
                mapping = weight_mapping(name, architecture, spec.role)
                whole = _read(saved, places[names[name]])
                yield from zip(mapping.names, mapping.sharding.join([whole]), strict=True)

    if adapter or not spec.model.lora_rank:
        yield from trained()
        return
    dtypes = {name: parameters[names[name]].dtype for name in names if not is_adapter(name)}
    yield from merge_saved(
        _starting_weights(spec, architecture, dtypes), dict(trained()), spec.model.lora_scale
    )


def _starting_weights(
    spec: ModelSpec, architecture: Architecture, dtypes: Mapping[str, torch.dtype]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights at `spec.model.path`, of parameters by global name; a critic's head may not be among them."""
    files = CheckpointFiles(spec)
    for name in sorted(dtypes, key=sort_key):
        for each in weight_mapping(name, architecture, spec.role).names:
            weight = files.read(each)
            if weight is not None:
                yield each, weight.to(dtypes[name])


def _read(saved: SavedTensors, place: Any) -> Tensor:
    """Read a parameter from its place, or from those of its parts."""
    if isinstance(place, ShardedTensorFactory):
        parts: Any = [_read(saved, part) for part in place.build()]
        return place.merge_fn(parts)
    sizes = (1,) * place.prepend_axis_num + place.local_shape
    return saved.read(place.key, place.global_offset, sizes).reshape(place.local_shape)
