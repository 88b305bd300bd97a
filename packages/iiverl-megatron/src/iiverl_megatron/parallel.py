"""The parallel layout of the processes: tensor, pipeline, context, expert and data parallel groups."""

from typing import cast

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from iiverl_core.config import MegatronConfig
from iiverl_core.errors import ConfigError
from iiverl_core.training import ParallelRank

_initialized_for: dist.ProcessGroup | None = None
"""The group that was laid out: megatron-core keeps a layout until the process ends."""


def init_parallel(parallel: MegatronConfig) -> None:
    """Divide the default group as `parallel` says; a process has one layout for all of its models.

    Raises:
        ConfigError: an earlier model has another layout.
    """
    wanted = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.virtual_pipeline_model_parallel_size,
        parallel.context_parallel_size,
        parallel.expert_model_parallel_size,
    )
    global _initialized_for
    if _initialized_for is not dist.group.WORLD:
        parallel_state.destroy_model_parallel()  # of an earlier run in this process
    if parallel_state.model_parallel_is_initialized():
        if wanted != parallel_sizes():
            raise ConfigError(
                f"models of one run share a layout: tensor, pipeline, virtual pipeline, context and expert parallel "
                f"sizes are {parallel_sizes()}, and a further model has {wanted}; give all sections `megatron` the same"
            )
        return
    tensor, pipeline, virtual, context, experts = wanted
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual,
        context_parallel_size=context,
        expert_model_parallel_size=experts,
        expert_tensor_parallel_size=1,
        create_gloo_process_groups=False,
    )
    model_parallel_cuda_manual_seed(parallel.seed)
    _initialized_for = dist.group.WORLD


def parallel_sizes() -> tuple[int, int, int | None, int, int]:
    """Return the sizes of tensor, pipeline, virtual pipeline, context and expert parallelism."""
    return (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_virtual_pipeline_model_parallel_world_size(),
        parallel_state.get_context_parallel_world_size(),
        parallel_state.get_expert_model_parallel_world_size(),
    )


def parallel_rank() -> ParallelRank:
    """Return the position of this process.

    The processes of one data-parallel rank get the same sequences. All processes of the last pipeline stage have the
    same results; the first of them is the output rank.
    """
    first = (
        parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_context_parallel_rank() == 0
    )
    return ParallelRank(
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        is_output_rank=first and parallel_state.is_pipeline_last_stage(),
    )


def tensor_group() -> dist.ProcessGroup:
    """Return the processes that share each layer's matrices."""
    return cast(dist.ProcessGroup, parallel_state.get_tensor_model_parallel_group())


def context_group() -> dist.ProcessGroup:
    """Return the processes that share each sequence."""
    return cast(dist.ProcessGroup, parallel_state.get_context_parallel_group())


def pipeline_group() -> dist.ProcessGroup:
    """Return the processes of all pipeline stages that have the same slices."""
    return cast(dist.ProcessGroup, parallel_state.get_pipeline_model_parallel_group())


def expert_pipeline_group() -> dist.ProcessGroup:
    """Return the processes that together have all experts of all pipeline stages."""
    return cast(dist.ProcessGroup, parallel_state.get_expert_tensor_model_pipeline_parallel_group())
