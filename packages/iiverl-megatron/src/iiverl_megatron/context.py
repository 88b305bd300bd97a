"""Context parallelism: each process of a group has a part of every sequence.

A sequence is cut into twice as many pieces as there are processes; each has one from the front and one from the back.
Since attention is causal, that gives all processes the same work. megatron-core's rotary positions and Transformer
Engine's attention use the same order.

Suffixes: `_L` columns of a row, `_S` columns on this process, `_T` trained tokens.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def local_columns(length: int, rank: int, size: int, device: torch.device) -> Tensor:
    """Return the columns (S,) that process `rank` of `size` has of rows of `length`, a multiple of 2 × `size`."""
    pieces_L = torch.arange(length, device=device).view(2 * size, -1)
    return pieces_L[[rank, 2 * size - 1 - rank]].flatten()


def gather_context(own_SB: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Gather the columns of all processes in order, (S, …) → (L, …); gradients return to their process."""
    return _GatherContext.apply(own_SB, group)


def gather_tokens(own: Tensor, local_T: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Gather one number per token, (T,), on every process, which has those that are `local_T`.

    All processes compute the same loss of them, and each keeps its own part of the gradient.
    """
    return _GatherTokens.apply(own, local_T, group)


class _GatherContext(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, group: dist.ProcessGroup) -> Tensor:
        size = dist.get_world_size(group)
        parts = own.new_empty(size, *own.shape)
        dist.all_gather_into_tensor(parts.flatten(0, 1), own.contiguous(), group=group)
        length = size * len(own)
        order_L = torch.cat([local_columns(length, rank, size, own.device) for rank in range(size)])
        ctx.group, ctx.mine = group, local_columns(length, dist.get_rank(group), size, own.device)
        whole = torch.empty_like(parts.flatten(0, 1))
        whole[order_L] = parts.flatten(0, 1)
        return whole

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad = grad_outputs[0].contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad[ctx.mine], None


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, local_T: Tensor, group: dist.ProcessGroup) -> Tensor:
        whole_T = own.new_zeros(len(local_T))
        whole_T[local_T] = own
        dist.all_reduce(whole_T, group=group)
        ctx.save_for_backward(local_T)
        return whole_T

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (local_T,) = ctx.saved_tensors
        return grad_outputs[0][local_T], None, None
