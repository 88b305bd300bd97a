"""Arrange sequences of different lengths in one rectangle of token ids, the input of a model.

`packed` puts all sequences into one row, the shortest first, each with positions from zero. It has no padding, and needs
attention within the row's segments (`training.attention`). `padded` gives each sequence a row, padded on the right. A
causal model never attends to the right, so a padded row needs no mask.

Suffixes: `_BL` rows and columns of the rectangle, `_S` sequences, `_T` trained tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from iiverl_core.samples import TokenSequence
from iiverl_core.training.attention import Segment
from iiverl_core.training.backend import LayoutKind


@dataclass(frozen=True)
class Layout:
    """Inputs of a causal model, and the positions in its output that predict the trained tokens.

    `position_ids_BL` is None if positions count from zero in every row. `segments` are those of a packed row, None for
    padded rows. `rows_T` and `columns_T` are the position that predicts each trained token, and `targets_T` is that token;
    `last_rows_S` and `last_columns_S` are the last token of each sequence.
    """

    input_ids_BL: Tensor
    position_ids_BL: Tensor | None
    segments: tuple[Segment, ...] | None
    rows_T: Tensor
    columns_T: Tensor
    targets_T: Tensor
    last_rows_S: Tensor
    last_columns_S: Tensor


def lay_out(sequences: Sequence[TokenSequence], kind: LayoutKind, device: torch.device) -> Layout:
    """Arrange sequences in one row, or in one row each.

    Raises:
        ValueError: a loss mask includes the first token, which nothing predicts.
    """
    lengths = np.array([len(sequence.token_ids) for sequence in sequences])
    starts = np.zeros_like(lengths)
    segments = positions = None
    if kind == "packed":
        order = lengths.argsort(kind="stable")  # attention computes similar lengths together
        starts[order] = lengths[order].cumsum() - lengths[order]
        segments = tuple(Segment(int(starts[i]), int(lengths[i])) for i in order)
        rows_S = np.zeros_like(lengths)
        ids = np.concatenate([sequences[i].token_ids for i in order])[None]
        positions = np.concatenate([np.arange(lengths[i]) for i in order])[None]
    else:
        rows_S = np.arange(len(sequences))
        ids = np.zeros((len(sequences), lengths.max()), dtype=np.int64)
        for row, sequence in zip(ids, sequences, strict=True):
            row[: len(sequence.token_ids)] = sequence.token_ids
    if any(sequence.loss_mask[0] for sequence in sequences):
        raise ValueError("a loss mask includes the first token of its sequence, which nothing predicts")
    trained = [np.flatnonzero(sequence.loss_mask) for sequence in sequences]

    def move(array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

    return Layout(
        input_ids_BL=move(ids),
        position_ids_BL=None if positions is None else move(positions),
        segments=segments,
        rows_T=move(np.repeat(rows_S, [len(at) for at in trained])),
        columns_T=move(np.concatenate([start + at - 1 for start, at in zip(starts, trained, strict=True)])),
        targets_T=move(np.concatenate([s.token_ids[at] for s, at in zip(sequences, trained, strict=True)])),
        last_rows_S=move(rows_S),
        last_columns_S=move(starts + lengths - 1),
    )
