"""A batch of sequences without padding: all their tokens in one flat tensor, and the length of each.

Every function of this layer works on such flat tensors. There is no padding that could change a result, and a
sequence without tokens is rejected. Suffixes: `_T` all response tokens of the batch one after another, `_B` one entry
per sequence, `_G` one per group.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """The lengths of B sequences whose T tokens are concatenated: `lengths_B` int64, each at least 1."""

    lengths_B: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> "Segments":
        """Create segments of the given lengths on `device`.

        Raises:
            ValueError: a sequence has no tokens.
        """
        if any(length < 1 for length in lengths):
            raise ValueError(
                f"a sequence without tokens is to be left out of the batch; lengths are {list(lengths)}"
            )
        return cls(torch.tensor(list(lengths), dtype=torch.long, device=device))

    def __len__(self) -> int:
        return self.lengths_B.numel()

    @cached_property
    def index_T(self) -> Tensor:
        """The index of the sequence that each token belongs to, (T,) int64."""
        return torch.repeat_interleave(torch.arange(len(self), device=self.lengths_B.device), self.lengths_B)

    @cached_property
    def last_B(self) -> Tensor:
        """The position in T of each sequence's last token, (B,) int64."""
        return self.lengths_B.cumsum(0) - 1

    def sum(self, x_T: Tensor) -> Tensor:
        """Sum over the tokens of each sequence, (T,) → (B,)."""
        return x_T.new_zeros(len(self)).index_add(0, self.index_T, x_T)

    def mean(self, x_T: Tensor) -> Tensor:
        """Mean over the tokens of each sequence, (T,) → (B,)."""
        return self.sum(x_T) / self.lengths_B

    def discounted_sum(self, x_T: Tensor, factor: float) -> Tensor:
        """Sum each token with the later ones of its sequence, discounted by factor^k at distance k, (T,) → (T,).

        The number of tokens in a sum doubles with each pass, so there are log₂(longest sequence) passes over T tokens
        instead of a loop over tokens, and rounding errors grow only with the number of passes.
        """
        sum_T = x_T.clone()
        longest = int(self.lengths_B.max()) if len(self) else 0
        distance = 1
        while distance < longest:
            inside_T = self.index_T[distance:] == self.index_T[:-distance]
            sum_T[:-distance] += torch.where(inside_T, sum_T[distance:] * factor**distance, 0.0)
            distance *= 2
        return sum_T

    def expand(self, x_B: Tensor) -> Tensor:
        """Repeat each sequence's value for each of its tokens, (B,) → (T,)."""
        return x_B[self.index_T]

    def at_last(self, x_B: Tensor) -> Tensor:
        """Put each sequence's value on its last token and zero elsewhere, (B,) → (T,)."""
        return x_B.new_zeros(int(self.lengths_B.sum())).index_put((self.last_B,), x_B)

    def split(self, x_T: Tensor) -> tuple[Tensor, ...]:
        """Split a flat tensor into one tensor per sequence."""
        return x_T.split(self.lengths_B.tolist())
