"""The layout of the processes: who shares a matrix, a pipeline, experts, or nothing but gradients."""

from typing import cast

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from iiverl_core.config import MegatronConfig
from iiverl_core.errors import ConfigError
from iiverl_core.training import ParallelRank

_laid_out: dist.ProcessGroup | None = None
"""The group whose processes have been laid out: megatron-core keeps layouts for as long as a process lives."""


def lay_out_processes(parallel: MegatronConfig) -> None:
    """Divide the processes of the default group as `parallel` says; a process has one layout for all of its models.

    Raises:
        ConfigError: another model was laid out otherwise before.
    """
    wanted = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.virtual_pipeline_model_parallel_size,
        parallel.context_parallel_size,
        parallel.expert_model_parallel_size,
    )
    global _laid_out
    if _laid_out is not dist.group.WORLD:
        parallel_state.destroy_model_parallel()  # what is left of a run before, in this same process
    if parallel_state.model_parallel_is_initialized():
        if wanted != layout_sizes():
            raise ConfigError(
                f"models of one run share a layout: tensor, pipeline, virtual pipeline, context and expert parallel "
                f"sizes are {layout_sizes()}, and a further model asks for {wanted}; give all sections `megatron` the same"
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
    _laid_out = dist.group.WORLD


def layout_sizes() -> tuple[int, int, int | None, int, int]:
    """Sizes of tensor, pipeline, virtual pipeline, context and expert parallel groups."""
    return (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_virtual_pipeline_model_parallel_world_size(),
        parallel_state.get_context_parallel_world_size(),
        parallel_state.get_expert_model_parallel_world_size(),
    )


def parallel_rank() -> ParallelRank:
    """Give the position of this process.

    The processes of one data-parallel rank work on the same sequences. Results are known in the last pipeline stage, the
    same to all of it, and its first process reports them.
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
    """The processes that share each layer's matrices."""
    return cast(dist.ProcessGroup, parallel_state.get_tensor_model_parallel_group())


def context_group() -> dist.ProcessGroup:
    """The processes that share each sequence."""
    return cast(dist.ProcessGroup, parallel_state.get_context_parallel_group())


def stages() -> dist.ProcessGroup:
    """The processes of all pipeline stages that have the same slices."""
    return cast(dist.ProcessGroup, parallel_state.get_pipeline_model_parallel_group())


def expert_stages() -> dist.ProcessGroup:
    """The processes that have all experts of all pipeline stages between them."""
    return cast(dist.ProcessGroup, parallel_state.get_expert_tensor_model_pipeline_parallel_group())
