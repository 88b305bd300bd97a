"""Arrange sequences of different lengths in one rectangle of token ids, the input of a model.

`packed` puts all sequences into one row, the shortest first, each with positions from zero. It has no padding, and needs
attention within the row's segments (`training.attention`). `shared` also has the longest common prefix of each group's
sequences, such as their prompt, only once: `[prompt][response 1][response 2]…`, where each response continues the positions
of the prompt and attends to it and to itself. `padded` gives each sequence a row, padded on the right. A causal model
never attends to the right, so a padded row needs no mask.

Several processes can divide a row (`RowPart`): each gets a part of its tokens, all parts of one length.

Suffixes: `_BL` rows and columns of the rectangle, `_S` sequences, `_T` trained tokens.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from iiverl_core.samples import ImageInputs, SequenceImage, TokenSequence
from iiverl_core.training.backend import LayoutKind
from iiverl_core.training.host_memory import to_device
from iiverl_core.training.spans import Segment
from iiverl_core.training.support import Support, support_of


class RowPart(NamedTuple):
    """The `rank`-th of `size` parts of a row."""

    rank: int
    size: int


WHOLE = RowPart(0, 1)


@dataclass(frozen=True)
class SequenceVision:
    """What a vision-language model sees of a sequence.

    `positions` (A, L) int64 are along each of the model's axes of positions, `mask` (L,) bool has the tokens of `images`, in order.
    """

    positions: np.ndarray
    mask: np.ndarray
    images: tuple[SequenceImage, ...]


@dataclass(frozen=True)
class PlacedImages:
    """Images in a rectangle of token ids.

    `pixel_values` (P, …) and `grids` (I, 3) are those of `ImageInputs`. `mask_BL` has their `count` tokens, in the order of
    rows and columns.
    """

    pixel_values: Tensor
    grids: Tensor
    mask_BL: Tensor
    count: int

    @classmethod
    def place(
        cls,
        sequences: Sequence[SequenceVision],
        rows: np.ndarray,
        columns: Sequence[np.ndarray],
        shape: tuple[int, int],
        device: torch.device,
    ) -> "PlacedImages | None":
        """Place the images of sequences whose tokens are at these rows and columns; None if there are none.

        Sequences that share a place have the same image there, which is taken once.
        """
        mask = np.zeros(shape, dtype=bool)
        placed: dict[tuple[int, int], ImageInputs] = {}
        for sequence, row, own in zip(sequences, rows.tolist(), columns, strict=True):
            mask[row, own[sequence.mask]] = True
            for start, image in sequence.images:
                placed.setdefault((row, int(own[start])), image)
        if not placed:
            return None
        images = [placed[place] for place in sorted(placed)]
        return cls(
            pixel_values=to_device(np.concatenate([each.pixel_values for each in images]), device),
            grids=to_device(np.stack([each.grid for each in images]), device),
            mask_BL=to_device(mask, device),
            count=int(mask.sum()),
        )


@dataclass(frozen=True)
class Layout:
    """Inputs of a causal model, and the positions in its output that predict the trained tokens.

    `position_ids_BL` is None if positions count from zero in every row; for a vision-language model it has a leading
    dimension of axes, and `images` are those of all sequences. `segments` are those of a packed row, None for
    padded rows. `rows_T` and `columns_T` are the position that predicts each trained token, and `targets_T` is that token;
    `support` are the tokens to choose from there, None for the whole vocabulary. `last_rows_S` and `last_columns_S` are the last token of each sequence.

    In a part of a row, `segments` are those of the whole row with its padding, and columns are counted from the beginning
    of the part. It predicts only some of the micro-batch's trained tokens, and has the last tokens of some sequences:
    `tokens_T` and `sequences_S` say which. If there are none, rows, columns and targets have one entry nevertheless,
    since all processes run the same layers.
    """

    input_ids_BL: Tensor
    position_ids_BL: Tensor | None
    segments: tuple[Segment, ...] | None
    rows_T: Tensor
    columns_T: Tensor
    targets_T: Tensor
    last_rows_S: Tensor
    last_columns_S: Tensor
    tokens_T: Tensor
    sequences_S: Tensor
    support: Support | None = None
    images: PlacedImages | None = None


def lay_out(
    sequences: Sequence[TokenSequence],
    kind: LayoutKind,
    device: torch.device,
    groups: Sequence[Hashable] = (),
    part: RowPart = WHOLE,
    vision: Sequence[SequenceVision] | None = None,
) -> Layout:
    """Arrange sequences in one row, or in one row each. `groups`, if known, has the group of each sequence.

    A vision-language model needs the `vision` of each sequence.

    Raises:
        ValueError: a loss mask includes the first token, which nothing predicts; or padded rows, or sequences with
            `vision`, are to be divided.
    """
    if (kind == "padded" or vision is not None) and part.size > 1:
        raise ValueError("only a packed row can be divided, and only of a model that reads no images")
    if any(sequence.loss_mask[0] for sequence in sequences):
        raise ValueError("a loss mask includes the first token of its sequence, which nothing predicts")
    lengths = [len(sequence.token_ids) for sequence in sequences]
    segments = positions = None
    if kind == "padded":
        ids = np.zeros((len(sequences), max(lengths)), dtype=np.int64)
        for row, sequence in zip(ids, sequences, strict=True):
            row[: len(sequence.token_ids)] = sequence.token_ids
        rows, columns = np.arange(len(sequences)), [np.arange(length) for length in lengths]
    else:
        shared = _common_prefixes(sequences, groups if kind == "shared" else ())
        segments, columns = _segments(lengths, shared)
        ids, positions = (
            np.zeros((1, sum(segment.length for segment in segments)), np.int64) for _ in range(2)
        )
        for sequence, own in zip(sequences, columns, strict=True):
            ids[0, own], positions[0, own] = sequence.token_ids, np.arange(len(own))
        rows = np.zeros(len(sequences), dtype=np.int64)
    images = None
    if vision is not None:
        positions = np.zeros((len(vision[0].positions), *ids.shape), np.int64)
        for row, own, each in zip(rows, columns, vision, strict=True):
            positions[:, row, own] = each.positions
        images = PlacedImages.place(vision, rows, columns, ids.shape, device)
    trained = [np.flatnonzero(sequence.loss_mask) for sequence in sequences]
    rows_T = np.repeat(rows, [len(at) for at in trained])
    columns_T = np.concatenate([own[at - 1] for own, at in zip(columns, trained, strict=True)])
    targets_T = np.concatenate([s.token_ids[at] for s, at in zip(sequences, trained, strict=True)])
    support = support_of(sequences, device)
    last_S = np.array([own[-1] for own in columns])
    tokens_T, sequences_S = np.arange(len(columns_T)), np.arange(len(last_S))
    if part.size > 1 and segments is not None and positions is not None:
        ids, positions, segments = _cut(ids, positions, segments, part)
        width = ids.shape[1]
        tokens_T, columns_T = _in_part(columns_T, part.rank, width)
        sequences_S, last_S = _in_part(last_S, part.rank, width)
        targets_T = targets_T[tokens_T] if len(tokens_T) else np.zeros(1, np.int64)
        if support is not None:
            support = support.at(torch.from_numpy(tokens_T)) if len(tokens_T) else None
        rows_T, rows = np.zeros_like(columns_T), np.zeros_like(last_S)

    def move(array: np.ndarray) -> Tensor:
        return to_device(array, device)

    return Layout(
        input_ids_BL=move(ids),
        position_ids_BL=None if positions is None else move(positions),
        segments=segments,
        rows_T=move(rows_T),
        columns_T=move(columns_T),
        targets_T=move(targets_T),
        last_rows_S=move(rows),
        last_columns_S=move(last_S),
        tokens_T=move(tokens_T),
        sequences_S=move(sequences_S),
        support=support,
        images=images,
    )


def _cut(
    ids: np.ndarray, positions: np.ndarray, segments: tuple[Segment, ...], part: RowPart
) -> tuple[np.ndarray, np.ndarray, tuple[Segment, ...]]:
    """Cut a part out of a row's ids and positions, and extend the row to a whole number of parts by another segment."""
    length = ids.shape[1]
    width = -(-length // part.size)
    if padding := width * part.size - length:
        segments = (*segments, Segment(length, padding))
        ids = np.concatenate([ids, np.zeros((1, padding), ids.dtype)], 1)
        positions = np.concatenate([positions, np.arange(padding)[None]], 1)
    columns = slice(part.rank * width, (part.rank + 1) * width)
    return np.ascontiguousarray(ids[:, columns]), np.ascontiguousarray(positions[:, columns]), segments


def _in_part(columns: np.ndarray, rank: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the columns in a part: their positions in the list, and where they are in the part; column 0 for none."""
    found = np.flatnonzero(columns // width == rank)
    return found, columns[found] - rank * width if len(found) else np.zeros(1, np.int64)


def _common_prefixes(sequences: Sequence[TokenSequence], groups: Sequence[Hashable]) -> list[tuple[int, int]]:
    """Find the longest common prefix of each group: for each sequence the group's first one, and the prefix's length.

    At least the last token of each sequence is its own. An image is in a prefix as a whole or not at all: its tokens are
    equal only if all are, and a sequence does not end with one.
    """
    members: dict[Hashable, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    prefixes = [(i, 0) for i in range(len(sequences))]
    for same in members.values():
        if len(same) == 1:
            continue
        width = min(len(sequences[i].token_ids) for i in same) - 1
        tokens = np.stack([sequences[i].content[:width] for i in same])
        different = np.flatnonzero((tokens != tokens[0]).any(0))
        common = int(different[0]) if len(different) else width
        for i in same:
            prefixes[i] = (same[0], common)
    return prefixes


def _segments(
    lengths: Sequence[int], prefixes: Sequence[tuple[int, int]]
) -> tuple[tuple[Segment, ...], list[np.ndarray]]:
    """Divide a row into segments, and find the columns of each sequence's tokens.

    Prefixes come before what continues them, and similar lengths side by side, since attention computes them together.
    """
    pieces = [(0, common, i, 0) for i, (first, common) in enumerate(prefixes) if common and first == i]
    pieces += [
        (common, length - common, i, common)
        for i, (length, (_, common)) in enumerate(zip(lengths, prefixes, strict=True))
    ]
    segments: list[Segment] = []
    starts: dict[tuple[int, int], int] = {}  # by sequence and its first token in the piece
    total = 0
    for common, length, i, first_token in sorted(pieces):
        prefix_start = starts[prefixes[i][0], 0] if common else 0
        segments.append(Segment(total, length, prefix_start, common))
        starts[i, first_token] = total
        total += length
    columns = [
        np.concatenate(
            [
                np.arange(common) + (starts[first, 0] if common else 0),
                np.arange(length - common) + starts[i, common],
            ]
        )
        for i, (length, (first, common)) in enumerate(zip(lengths, prefixes, strict=True))
    ]
    return tuple(segments), columns
