"""A model's weights, optimizer and random states on disk, each process its part, to be read in any layout.

The files are those of megatron-core's `dist_checkpointing`, which names every slice by its place in the whole tensor.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from iiverl_core.errors import CheckpointError
from iiverl_megatron.parallel import layout_sizes

OPTIMIZER = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
}
"""The optimizer's state is put together by parameter and cut as that is, so that it can be read in another layout."""


def save(folder: Path, chunks: Sequence[Any], optimizer: Any) -> None:
    """Write a model into `folder`, which is made; all processes take part."""
    folder.mkdir(parents=True, exist_ok=True)
    state = _sharded(chunks, optimizer, loading=False)
    state |= {"layout": layout_sizes(), "rng": _random_states()}
    dist_checkpointing.save(state, str(folder))


def load(folder: Path, chunks: Sequence[Any], optimizer: Any) -> None:
    """Take a model over from `folder`. Random states are taken over in the layout that they were saved in.

    Raises:
        CheckpointError: there is none, or it is not of this model.
    """
    try:
        saved = dist_checkpointing.load_common_state_dict(str(folder))
        state = _sharded(chunks, optimizer, loading=True)
        if same := saved["layout"] == layout_sizes():
            state["rng"] = _random_states()
        found: Any = dist_checkpointing.load(state, str(folder))
    except (CheckpointingException, KeyError, OSError, ValueError) as error:
        raise CheckpointError(f"{folder} holds no checkpoint of this model: {error}") from error
    for i, chunk in enumerate(chunks):
        getattr(chunk, "module", chunk).load_state_dict(found[f"model{i}"])
    if optimizer is not None:
        with _keeping_steps():
            optimizer.load_state_dict(found["optimizer"])
    if same:
        torch.set_rng_state(found["rng"]["cpu"])
        torch.cuda.set_rng_state(found["rng"]["device"])
        _tracker().set_states(found["rng"]["tracker"])


@contextmanager
def _keeping_steps() -> Iterator[None]:
    """Let optimizer states be loaded where torch's AdamW holds them.

    It has the number of its step among each parameter's states, while a checkpoint has it once, from where it has been
    loaded by then; megatron-core 0.16 looks for it with the parameter's tensors nevertheless.
    """
    fill = DistributedOptimizer._set_main_param_and_optimizer_states

    def filled(self: Any, parameter: Any, tensors: dict[str, torch.Tensor]) -> None:
        group, position = self.model_param_group_index_map[parameter]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][position]]
        fill(self, parameter, {**tensors, "step": state["step"]} if "step" in state else tensors)

    with patch.object(DistributedOptimizer, "_set_main_param_and_optimizer_states", filled):
        yield


def _sharded(chunks: Sequence[Any], optimizer: Any, *, loading: bool) -> dict[str, Any]:
    """Say of each slice of this process where it belongs."""
    metadata = {
        **OPTIMIZER,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    state = {
        f"model{i}": getattr(chunk, "module", chunk).sharded_state_dict(metadata=metadata)
        for i, chunk in enumerate(chunks)
    }
    if optimizer is not None:
        whole = state if len(chunks) > 1 else state["model0"]
        state["optimizer"] = optimizer.sharded_state_dict(whole, is_loading=loading, metadata=metadata)
    return state


def _tracker() -> Any:
    return get_cuda_rng_tracker()


def _random_states() -> ShardedObject:
    """This process's random states: the same for all data-parallel ranks, so one of them writes them."""
    states = {
        "cpu": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "tracker": _tracker().get_states(),
    }
    tensor, pipeline, *_ = layout_sizes()
    here = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
    )
    copy = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    return ShardedObject("rng", states, (pipeline, tensor), here, replica_id=copy)
