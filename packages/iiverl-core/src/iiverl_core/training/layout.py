"""The last thing before the model: sequences of true lengths become one rectangle of token ids.

`packed` puts all sequences into one row, each with positions from zero; it wastes nothing and needs attention that
knows where a sequence ends (variable-length kernels, or a block-diagonal mask). `padded` gives each sequence a row,
filled up on the right. A causal model never looks to the right, so a padded row needs no mask at all.

Suffixes: `_BL` rows and columns of the rectangle, `_T` response tokens, `_TV` their logits over the vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Inputs of a causal model, and where in its output the response tokens are predicted.

    `position_ids_BL` is None where positions simply count from zero. The model is asked for the logits of the columns
    `keep` alone (`logits_to_keep` of transformers); in these, `rows_T` and `columns_T` find the position that predicts
    each response token, and `targets_T` is that token.
    """

    input_ids_BL: Tensor
    position_ids_BL: Tensor | None
    keep: int | Tensor
    rows_T: Tensor
    columns_T: Tensor
    targets_T: Tensor

    def pick(self, logits: Tensor) -> Tensor:
        """Take the logits that predict the response tokens, (B, kept, V) → (T, V)."""
        return logits[self.rows_T, self.columns_T]


def lay_out(
    prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], *, packed: bool, device: torch.device
) -> Layout:
    """Arrange sequences of at least one prompt and one response token each."""
    arrange = _pack if packed else _pad
    targets_T = torch.from_numpy(np.concatenate(responses))
    ids, positions, keep, rows_T, columns_T = arrange(prompts, responses)
    moved = keep.to(device) if isinstance(keep, Tensor) else keep
    return Layout(
        ids.to(device),
        None if positions is None else positions.to(device),
        moved,
        rows_T.to(device),
        columns_T.to(device),
        targets_T.to(device),
    )


def _pack(prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray]):
    sequences = [np.concatenate(pair) for pair in zip(prompts, responses, strict=True)]
    lengths = [len(sequence) for sequence in sequences]
    starts = np.cumsum([0, *lengths[:-1]])
    ids = torch.from_numpy(np.concatenate(sequences))[None]
    positions = torch.from_numpy(np.concatenate([np.arange(length) for length in lengths]))[None]
    keep = np.concatenate(
        [
            start + len(p) - 1 + np.arange(len(r))
            for start, p, r in zip(starts, prompts, responses, strict=True)
        ]
    )
    columns_T = torch.arange(len(keep))
    return ids, positions, torch.from_numpy(keep), torch.zeros_like(columns_T), columns_T


def _pad(prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray]):
    width = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    first = min(len(p) for p in prompts) - 1  # the first column that predicts a response token in any row
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    columns = []
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        ids[row, : len(prompt) + len(response)] = torch.from_numpy(np.concatenate((prompt, response)))
        columns.append(len(prompt) - 1 - first + np.arange(len(response)))
    rows_T = torch.repeat_interleave(torch.arange(len(responses)), torch.tensor([len(r) for r in responses]))
    return ids, None, width - first, rows_T, torch.from_numpy(np.concatenate(columns))
