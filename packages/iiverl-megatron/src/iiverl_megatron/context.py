"""Context parallelism: the processes of a group have a part of every sequence each.

A sequence is cut into twice as many pieces as there are processes, of which each has one from the front and one from
the back: attention is causal, so the work on them together is the same for all. That is the order of megatron-core's
rotary positions and of Transformer Engine's attention, too.

Suffixes: `_L` columns of a row, `_S` columns on this process, `_T` trained tokens.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def own_columns(length: int, rank: int, size: int, device: torch.device) -> Tensor:
    """The columns of rows of `length` that process `rank` of `size` has, (S,); `length` is a multiple of 2 × `size`."""
    pieces_L = torch.arange(length, device=device).view(2 * size, -1)
    return pieces_L[[rank, 2 * size - 1 - rank]].flatten()


def whole_context(own_SB: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Put all processes' columns together in order, (S, …) → (L, …); the gradient goes back to where each came from."""
    return _Gathered.apply(own_SB, group)


def from_owners(own: Tensor, here_T: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Give every process the numbers of all tokens, (T,), of which it has those that are `here_T`.

    All processes go on with the same numbers to the same loss, and each takes of its gradient the part that is its own.
    """
    return _FromOwners.apply(own, here_T, group)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, group: dist.ProcessGroup) -> Tensor:
        size = dist.get_world_size(group)
        parts = own.new_empty(size, *own.shape)
        dist.all_gather_into_tensor(parts.flatten(0, 1), own.contiguous(), group=group)
        length = size * len(own)
        order_L = torch.cat([own_columns(length, rank, size, own.device) for rank in range(size)])
        ctx.group, ctx.mine = group, own_columns(length, dist.get_rank(group), size, own.device)
        whole = torch.empty_like(parts.flatten(0, 1))
        whole[order_L] = parts.flatten(0, 1)
        return whole

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad = grad_outputs[0].contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad[ctx.mine], None


class _FromOwners(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, here_T: Tensor, group: dist.ProcessGroup) -> Tensor:
        whole_T = own.new_zeros(len(here_T))
        whole_T[here_T] = own
        dist.all_reduce(whole_T, group=group)
        ctx.save_for_backward(here_T)
        return whole_T

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (here_T,) = ctx.saved_tensors
        return grad_outputs[0][here_T], None, None
