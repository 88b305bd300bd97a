"""Ulysses: a group of processes runs each row in parts (Jacobs et al. 2023, arXiv:2309.14509).

Each process has a part of the row's tokens, all of one length. Around attention, an all-to-all gives it the whole row for
a part of the heads, and another one its tokens of all heads back. The heads of keys and values are repeated if there are
too few of them to be divided. Everything else works on single tokens.

All processes of a group get all results of a micro-batch, and compute the same loss. Each passes on the gradient of the
results that it has computed, so the gradients of the processes add up to that of the loss.

Suffixes: `_THD` tokens, heads, features of a head; `_PTF` processes, tokens, features; `_N` results of this process.
"""

from math import lcm
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from iiverl_core.training.attention import PackedAttention
from iiverl_core.training.layout import RowPart


class SequenceGroup:
    """This process and its neighbours, which run parts of the same rows: `size` consecutive processes."""

    def __init__(self, size: int, device: torch.device) -> None:
        """Join the group; all processes take part."""
        shape = dist.get_world_size() // size, size
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("data", "sequence"))
        self.group: dist.ProcessGroup = mesh.get_group("sequence")
        self.part = RowPart(mesh.get_local_rank("sequence"), size)

    def gather(self, results_N: Tensor, places_N: Tensor, count: int) -> Tensor:
        """Put together the results of all processes, (`count`,).

        `places_N` has the place of each result; without any, `results_N` has one that does not count.
        """
        own = results_N.new_zeros(count).index_put((places_N,), results_N[: len(places_N)])
        whole: Tensor = _Sum.apply(own, self.group)
        return whole


class SplitAttention:
    """`PackedAttention` over a row of which each process of a group has a part."""

    def __init__(self, whole: PackedAttention, group: SequenceGroup) -> None:
        self._whole, self._group, self._size = whole, group.group, group.part.size

    def attend(
        self,
        query_THD: Tensor,
        key_THD: Tensor,
        value_THD: Tensor,
        *,
        scale: float | None = None,
        window: int | None = None,
    ) -> Tensor:
        """See `PackedAttention.attend`; arguments and result are of this process's tokens."""
        heads = key_THD.shape[1]
        if copies := lcm(heads, self._size) // heads - 1:
            key_THD, value_THD = (x.repeat_interleave(copies + 1, 1) for x in (key_THD, value_THD))
        states = query_THD, key_THD, value_THD
        by_heads = [x.unflatten(1, (self._size, -1)).transpose(0, 1) for x in states]
        sent_PTF = torch.cat([x.flatten(2) for x in by_heads], -1)
        row_TF = self._exchange(sent_PTF).flatten(0, 1)
        parts = row_TF.split([x.shape[2] * x.shape[3] for x in by_heads], -1)
        row = [part.unflatten(1, x.shape[2:]) for part, x in zip(parts, by_heads, strict=True)]
        attended_THD = self._whole.attend(row[0], row[1], row[2], scale=scale, window=window)
        return self._exchange(attended_THD.unflatten(0, (self._size, -1))).transpose(0, 1).flatten(1, 2)

    def _exchange(self, x: Tensor) -> Tensor:
        exchanged: Tensor = _AllToAll.apply(x, self._group)
        return exchanged


class _AllToAll(torch.autograd.Function):
    """Send the i-th entry to the i-th process; the gradient takes the same way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        received = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, x.contiguous(), group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _AllToAll.apply(gradients[0], ctx.group), None


class _Sum(torch.autograd.Function):
    """Sum over a group whose processes all compute the same from it: each has its own part of the gradient already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None
