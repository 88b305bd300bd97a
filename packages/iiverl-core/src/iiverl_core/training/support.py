"""The tokens over which a policy's softmax is taken, if top-k or top-p left some out when the response was sampled.

An engine that samples with top-k or top-p draws from a distribution that is cut off and renormalised. The trainer's is the
same only if it leaves out the same tokens (DeepSeek-AI 2025, "DeepSeek-V3.2", section 3.1, "Keep Sampling Mask").

Suffixes: `_T` trained tokens, `_K` their kept tokens, one after another, `_RC` the rows and columns of a tile.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from iiverl_core.samples import KEPT_COUNTS, KEPT_IDS, TokenSequence

LOWEST = -1e30  # less than any logit, and finite when multiplied by zero


@dataclass(frozen=True)
class Support:
    """The tokens that may follow at each of T positions: `ids_K` at `rows_K`, or all at those where `whole_T` is true.

    `ends_T` counts the kept tokens up to and including each position. It stays on the CPU, as do all sizes.
    """

    rows_K: Tensor
    ids_K: Tensor
    whole_T: Tensor
    ends_T: np.ndarray

    @classmethod
    def of(cls, counts_T: np.ndarray, ids_K: np.ndarray, device: torch.device) -> "Support":
        """Build it from how many tokens were kept at each position, 0 for all, and which."""
        rows_K = np.repeat(np.arange(len(counts_T)), counts_T)
        return cls(
            *(torch.from_numpy(a).to(device) for a in (rows_K, ids_K.astype(np.int64), counts_T == 0)),
            ends_T=np.cumsum(counts_T, dtype=np.int64),
        )

    def at(self, positions: Tensor) -> "Support":
        """Return the support at some of the positions, given by their indices or a mask."""
        index = torch.arange(len(self.whole_T))[positions.cpu()].numpy()
        counts_T = np.diff(self.ends_T, prepend=0)
        ids_K = self.ids_K.cpu().numpy()
        ids = [ids_K[self.ends_T[i] - counts_T[i] : self.ends_T[i]] for i in index]
        return Support.of(counts_T[index], np.concatenate([ids_K[:0], *ids]), self.ids_K.device)

    def excluded(self, rows: slice, first: int, width: int) -> Tensor:
        """Return which of the tokens `first` … `first + width - 1` are left out at the positions `rows`, (R, C) bool."""
        stop = min(rows.stop, len(self.ends_T))
        begin_K, end_K = (int(self.ends_T[i - 1]) if i else 0 for i in (rows.start, stop))
        columns_K = self.ids_K[begin_K:end_K] - first
        # Tokens of other tiles go to one more column: a selection would have to wait for the device.
        columns_K = columns_K.where((columns_K >= 0) & (columns_K < width), width)
        excluded_RC = (~self.whole_T[rows.start : stop, None]).repeat(1, width + 1)
        excluded_RC[self.rows_K[begin_K:end_K] - rows.start, columns_K] = False
        return excluded_RC[:, :width]


def support_of(sequences: Sequence[TokenSequence], device: torch.device) -> Support | None:
    """Return the support of all trained tokens of sequences, in turn; None if no tokens were left out."""
    if not any(KEPT_IDS in sequence.extras for sequence in sequences):
        return None
    counts = [s.extras.get(KEPT_COUNTS, np.zeros(s.trained, np.int32)) for s in sequences]
    ids = [s.extras.get(KEPT_IDS, np.zeros(0, np.int32)) for s in sequences]
    return Support.of(np.concatenate(counts), np.concatenate(ids), device)
