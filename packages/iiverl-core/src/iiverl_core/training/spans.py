"""Ranges of tokens of a packed row: what they attend to, and as a padded batch."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from iiverl_core.training.host_memory import to_device


class Segment(NamedTuple):
    """The tokens `start` … `start + length - 1` of a packed row, which attend to each other causally.

    If it continues a prefix, an earlier segment of the row, its tokens also attend to the first `prefix_length` tokens
    from `prefix_start` on.
    """

    start: int
    length: int
    prefix_start: int = 0
    prefix_length: int = 0


class Spans:
    """Ranges of tokens, first token and length, padded on the right with copies of their last tokens.

    Attributes:
        count: number of ranges, B.
        width: length of the longest, L.
        adjoining: whether each begins where the one before ends; others have to be gathered.
        tokens_BL: the token of the row at each place of the batch, an array.
    """

    def __init__(self, ranges: Sequence[tuple[int, int]], device: torch.device) -> None:
        start_B, length_B = np.array(ranges).T
        self.count, self.width = len(start_B), int(length_B.max())
        places = np.arange(self.width)
        self.tokens_BL = start_B[:, None] + np.minimum(places, length_B[:, None] - 1)
        padded = bool((length_B < self.width).any())
        self.adjoining = bool((start_B[1:] == start_B[:-1] + length_B[:-1]).all())
        kept = np.flatnonzero(places < length_B[:, None])
        tokens = self.tokens_BL.ravel()
        self._slice = slice(int(start_B[0]), int(start_B[-1] + length_B[-1])) if self.adjoining else None
        self._own = None if self.adjoining else to_device(tokens[kept], device)
        # The token at each place, if they are not those of the slice, and the places that are no padding, if any is.
        self._places = to_device(tokens, device) if padded or not self.adjoining else None
        self._kept = to_device(kept, device) if padded else None

    def batch(self, row: Tensor) -> Tensor:
        """Take these tokens: (T, H, …) to (B, H, L, …)."""
        taken = row[self._slice] if self._places is None else row.index_select(0, self._places)
        return self._unflattened(taken)

    def gradients(self, row: Tensor) -> Tensor:
        """Take gradients of these tokens; those of padding are zero."""
        if self._kept is None:
            return self.batch(row)
        padded = row.new_zeros(self.count * self.width, *row.shape[1:])
        return self._unflattened(padded.index_copy_(0, self._kept, self.of(row)))

    def tokens(self, batch: Tensor) -> Tensor:
        """Return the tokens of a batch behind one another, without padding: (B, H, L, …) to (tokens, H, …)."""
        flat = batch.transpose(1, 2).flatten(0, 1)
        return flat if self._kept is None else flat.index_select(0, self._kept)

    def of(self, row: Tensor) -> Tensor:
        """Return these tokens of a row behind one another: (T, …) to (tokens, …)."""
        return row[self._slice] if self._own is None else row.index_select(0, self._own)

    def put(self, row: Tensor, tokens: Tensor) -> None:
        """Replace these tokens of a row."""
        if self._own is None:
            row[self._slice] = tokens
        else:
            row.index_copy_(0, self._own, tokens.to(row.dtype))

    def _unflattened(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(0, (self.count, self.width)).transpose(1, 2)
