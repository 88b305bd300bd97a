"""Statistics over the responses to the same prompt."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

EPSILON = 1e-6
"""Added to a group's standard deviation, so that advantages stay finite in a group of almost equal rewards."""


@dataclass(frozen=True)
class Groups:
    """The group of each of B responses: `index_B` int64, at least 0, in any order and with gaps.

    Every result has one entry per response, (B,), and depends only on responses of the same group.
    """

    index_B: Tensor

    @cached_property
    def _groups(self) -> int:
        return int(self.index_B.max()) + 1 if self.index_B.numel() else 0

    @cached_property
    def count_B(self) -> Tensor:
        """The number of responses in each response's group, (B,) int64, at least 1."""
        return torch.bincount(self.index_B, minlength=self._groups)[self.index_B]

    def sum(self, x_B: Tensor) -> Tensor:
        """Sum over each response's group, (B,)."""
        return x_B.new_zeros(self._groups).index_add(0, self.index_B, x_B)[self.index_B]

    def min(self, x_B: Tensor) -> Tensor:
        """Minimum over each response's group, (B,)."""
        x_G = x_B.new_zeros(self._groups)
        return x_G.scatter_reduce(0, self.index_B, x_B, "amin", include_self=False)[self.index_B]

    def centred(self, x_B: Tensor, weight_B: Tensor | None = None) -> Tensor:
        """Subtract the mean of the group, weighted by `weight_B` (positive) if given, (B,).

        The result is exactly 0 in a group of one and in a group of equal values: the mean is taken over distances from
        the group's minimum, so a large common offset causes no rounding error.
        """
        above_B = x_B - self.min(x_B)
        if weight_B is None:
            return above_B - self.sum(above_B) / self.count_B
        return above_B - self.sum(weight_B * above_B) / self.sum(weight_B)

    def std(self, x_B: Tensor) -> Tensor:
        """Unbiased standard deviation of the group, (B,); 0 in a group of one."""
        return (self.sum(self.centred(x_B).square()) / (self.count_B - 1).clamp(min=1)).sqrt()
