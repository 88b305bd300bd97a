"""Arrange sequences of different lengths in one rectangle of token ids, the input of a model.

`packed` puts all sequences into one row, each with positions from zero. It has no padding, and needs attention that
respects sequence boundaries (variable-length kernels, or a block-diagonal mask). `padded` gives each sequence a row,
padded on the right. A causal model never attends to the right, so a padded row needs no mask.

Suffixes: `_BL` rows and columns of the rectangle, `_S` sequences, `_T` trained tokens, `_TV` their logits over the
vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from iiverl_core.samples import TokenSequence


@dataclass(frozen=True)
class Layout:
    """Inputs of a causal model, and the positions in its output that predict the trained tokens.

    `position_ids_BL` is None if positions count from zero in every row. `rows_T` and `columns_T` are the position that
    predicts each trained token, and `targets_T` is that token; `last_rows_S` and `last_columns_S` are the last token of
    each sequence. A language model computes the logits of the columns `keep` only (`logits_to_keep` of transformers: a
    number counts from the right, a tensor lists columns).
    """

    input_ids_BL: Tensor
    position_ids_BL: Tensor | None
    keep: int | Tensor
    rows_T: Tensor
    columns_T: Tensor
    targets_T: Tensor
    last_rows_S: Tensor
    last_columns_S: Tensor

    def pick(self, logits: Tensor) -> Tensor:
        """Take the logits that predict the trained tokens, (B, kept, V) → (T, V)."""
        if self.keep is self.columns_T:  # one row, and each column belongs to one token
            return logits[0]
        if isinstance(self.keep, Tensor):
            return logits[self.rows_T, torch.searchsorted(self.keep, self.columns_T)]
        return logits[self.rows_T, self.columns_T - (self.input_ids_BL.shape[1] - self.keep)]


def lay_out(sequences: Sequence[TokenSequence], *, packed: bool, device: torch.device) -> Layout:
    """Arrange sequences in one row (`packed`) or in one row each.

    Raises:
        ValueError: a loss mask includes the first token, which nothing predicts.
    """
    lengths = np.array([len(sequence.token_ids) for sequence in sequences])
    if packed:
        starts = lengths.cumsum() - lengths
        rows_S = np.zeros_like(lengths)
        ids = np.concatenate([sequence.token_ids for sequence in sequences])[None]
        positions = np.concatenate([np.arange(length) for length in lengths])[None]
    else:
        starts = np.zeros_like(lengths)
        rows_S = np.arange(len(sequences))
        ids = np.zeros((len(sequences), lengths.max()), dtype=np.int64)
        for row, sequence in zip(ids, sequences, strict=True):
            row[: len(sequence.token_ids)] = sequence.token_ids
        positions = None
    if any(sequence.loss_mask[0] for sequence in sequences):
        raise ValueError("a loss mask includes the first token of its sequence, which nothing predicts")
    trained = [np.flatnonzero(sequence.loss_mask) for sequence in sequences]

    def move(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    columns = move(np.concatenate([start + at - 1 for start, at in zip(starts, trained, strict=True)]))
    return Layout(
        input_ids_BL=move(ids),
        position_ids_BL=None if positions is None else move(positions),
        keep=columns if packed else _kept_columns(columns, trained, ids.shape[1]),
        rows_T=move(np.repeat(rows_S, [len(at) for at in trained])),
        columns_T=columns,
        targets_T=move(np.concatenate([s.token_ids[at] for s, at in zip(sequences, trained, strict=True)])),
        last_rows_S=move(rows_S),
        last_columns_S=move(starts + lengths - 1),
    )


def _kept_columns(columns: Tensor, trained: Sequence[np.ndarray], width: int) -> int | Tensor:
    """Select the columns of padded rows: from the first needed one on, or a union if trained tokens have gaps."""
    if any(len(at) and at[-1] - at[0] + 1 != len(at) for at in trained):
        return columns.unique()
    return width - int(columns.min()) if len(columns) else 1
