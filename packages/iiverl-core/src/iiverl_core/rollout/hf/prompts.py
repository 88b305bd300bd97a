"""Prompts whose keys and values are kept once for all of their sequences.

A token of a response attends to its prompt and to the response. The queries of all responses to a prompt attend to it in
one product, and what they find is merged with what they find in their own tokens: with `o_i` and `l_i`, the attended values
and the log-sum-exp of the scores over disjoint sets of keys, attention over both is `o_1 + sigmoid(l_2 - l_1) (o_2 - o_1)`.

Suffixes: `_P` prompts, `_R` the most rows of a prompt, `_B` rows of the batch, `_S` those that have their prompt here, `_G`
heads of keys, `_H` heads of queries of one of these, `_D` features of a head, `_L` tokens.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# Tokens of further copies of a prompt that take longer to read than the calls that attention in two parts needs:
PAYS = 1024

_KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class Attended(NamedTuple):
    """What queries found in their keys (B, G, H, D), and the log-sum-exp of their scores (B, G, H)."""

    values: Tensor
    lse: Tensor


def attend(
    query_BGHD: Tensor, key_BGLD: Tensor, value_BGLD: Tensor, mask: Tensor | None, scale: float
) -> Attended:
    """Attend to keys on a CPU; `mask` is bool, true where a query sees a key, and every query sees one."""
    dtype, wide = query_BGHD.dtype, torch.promote_types(query_BGHD.dtype, torch.float32)
    if dtype is not wide and key_BGLD.shape == value_BGLD.shape:
        if mask is not None:
            mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))
        # The kernel takes it for granted that features are next to each other.
        states = [x if x.stride(-1) == 1 else x.contiguous() for x in (query_BGHD, key_BGLD, value_BGLD)]
        return Attended(*_KERNEL(*states, attn_mask=mask, scale=scale))
    # Faster than the kernel, which is made for many queries:
    scores = (query_BGHD @ key_BGLD.mT).to(wide).mul_(scale)
    if mask is not None:
        scores.masked_fill_(~mask, float("-inf"))
    highest = scores.amax(-1, keepdim=True)
    weights = scores.sub_(highest).exp_()
    total = weights.sum(-1, keepdim=True)
    values = (weights.to(dtype) @ value_BGLD).div_(total)
    return Attended(values, total.log_().add_(highest)[..., 0])


class SharedPrompts:
    """The keys and values of some prompts, and the rows of the batch that continue them."""

    def __init__(self, states: list[tuple[Tensor, Tensor]], padding_P: np.ndarray, repeats: int) -> None:
        """Keep prompts, each of which has `repeats` rows, one after the other.

        Args:
            states: keys and values (P, G, L, D) of each layer.
            padding_P: columns before the first token of each prompt.
        """
        self._states = states
        columns = torch.arange(states[0][0].shape[-2])
        padding = torch.from_numpy(padding_P)[:, None, None, None]
        self._mask = columns >= padding if padding_P.any() else None
        self._place(np.repeat(np.arange(len(padding_P)), repeats), np.arange(len(padding_P) * repeats))

    def _place(self, prompt_S: np.ndarray, rows_S: np.ndarray) -> None:
        """Arrange the queries of `rows_S` of the batch by their prompts."""
        self._prompt_S, self._rows_S = prompt_S, rows_S
        order = np.argsort(prompt_S, kind="stable")
        counts = np.bincount(prompt_S)
        number = np.empty_like(order)  # of a row among those of its prompt
        number[order] = np.arange(len(order)) - np.repeat(counts.cumsum() - counts, counts)
        rows_PR = np.full((len(counts), counts.max()), rows_S[0])  # what fills it is computed in vain
        rows_PR[prompt_S, number] = rows_S
        self._rows_PR = torch.from_numpy(rows_PR)
        self._places_S = torch.from_numpy(prompt_S * rows_PR.shape[1] + number)
        self._rows = torch.from_numpy(rows_S)

    def keep(self, order_B: np.ndarray) -> bool:
        """Keep rows, `order_B` having their old positions; return whether any row is left that continues a prompt."""
        prompt = np.full(max(int(order_B.max()), int(self._rows_S.max())) + 1, -1)
        prompt[self._rows_S] = self._prompt_S
        prompt_B = prompt[order_B]
        rows_S = np.flatnonzero(prompt_B >= 0)
        if not len(rows_S):
            return False
        kept, prompt_S = np.unique(prompt_B[rows_S], return_inverse=True)
        if len(kept) < self._rows_PR.shape[0]:
            index = torch.from_numpy(kept)
            self._states = [(keys[index], values[index]) for keys, values in self._states]
            self._mask = None if self._mask is None else self._mask[index]
        self._place(prompt_S, rows_S)
        return True

    def move(self, count: int) -> None:
        """Take note that `count` rows are before what was the first one."""
        self._place(self._prompt_S, self._rows_S + count)

    def merge(self, layer: int, query_BGHD: Tensor, own: Attended, scale: float) -> None:
        """Merge what queries find in their prompts, in a layer, into the values that they found in their `own` tokens."""
        found = attend(
            query_BGHD[self._rows_PR].transpose(1, 2).flatten(2, 3), *self._states[layer], self._mask, scale
        )
        values_SGHD, lse_SGH = (
            x.unflatten(2, (self._rows_PR.shape[1], -1)).transpose(1, 2).flatten(0, 1)[self._places_S]
            for x in found
        )
        own_values_SGHD, own_lse_SGH = own.values[self._rows], own.lse[self._rows]
        share_SGH1 = (lse_SGH - own_lse_SGH).sigmoid_()[..., None].to(values_SGHD.dtype)
        own.values[self._rows] = own_values_SGHD.lerp(values_SGHD, share_SGH1)
