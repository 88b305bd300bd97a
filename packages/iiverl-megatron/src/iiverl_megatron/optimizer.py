"""AdamW with its state sharded over data-parallel processes."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from iiverl_core.config import OptimConfig
from iiverl_core.training import StepResult


def make_optimizer(chunks: Sequence[DistributedDataParallel], optim: OptimConfig) -> Any:
    """Build megatron-core's distributed optimizer; weights that are not fp32 have fp32 masters."""
    dtype = chunks[0].config.params_dtype
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=optim.lr,
            weight_decay=optim.weight_decay,
            adam_beta1=optim.betas[0],
            adam_beta2=optim.betas[1],
            adam_eps=1e-8,
            clip_grad=0.0,  # `step` clips, with the norm that it reports
            params_dtype=dtype,
            bf16=dtype is torch.bfloat16,
            use_distributed_optimizer=True,
        ),
        list(chunks),
        config_overrides={},  # all weights decay, as under FSDP; by default those of one dimension would not
        use_gloo_process_groups=False,
    )
    assert isinstance(optimizer, ChainedOptimizer)  # which it returns in every case
    for part in optimizer.chained_optimizers:
        fuse(part.optimizer)
    return optimizer


def fuse(optimizer: torch.optim.Optimizer) -> None:
    """Let AdamW step in one kernel, as under FSDP.

    megatron-core takes torch's AdamW where neither Transformer Engine nor apex is installed, which have fused ones. By
    default that is a chain of operations over all parameters, with a copy of them in fp32 at its peak.
    """
    if isinstance(optimizer, torch.optim.AdamW):
        for settings in (optimizer.defaults, *optimizer.param_groups):
            settings |= {"fused": True, "foreach": False}


def step(
    chunks: Sequence[DistributedDataParallel], optimizer: Any, lr: float, grad_clip: float | None
) -> StepResult:
    """Sum the gradients over processes, clip them, step unless they are not finite, and clear them."""
    finalize_model_grads(list(chunks))
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    taken = math.isfinite(norm)
    if taken:
        for group in optimizer.param_groups:
            group["lr"] = lr
        if grad_clip is not None:
            for part in optimizer.chained_optimizers:
                clip_grad_by_total_norm_fp32(part.get_parameters(), grad_clip, norm)
        optimizer.step_with_ready_grads()
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    return StepResult(grad_norm=norm, taken=taken)
