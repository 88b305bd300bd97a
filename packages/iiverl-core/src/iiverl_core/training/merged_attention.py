"""Attention of a packed row on CPUs: each part of what a token attends to is computed apart, and the parts are merged.

With a mask, a response that continues a prompt would be compared with all keys of both, the later ones of its own as
well, and torch's kernel does so without a mask, too, up to 512 keys. Here segments are cut into chunks: a chunk attends
causally to itself, and fully to the chunks before it and to the prefix. All responses to one prompt attend to it in one
call, without padding or copies of its keys.

With `o_i` and `l_i`, the attended values and the log-sum-exp of the scores over disjoint sets of keys, attention over
their union has `l = logaddexp(l_1, l_2)` and `o = Σ exp(l_i - l) o_i` (Liu et al., "Ring Attention", 2023,
arXiv:2310.01889). The gradient through each set is that of a kernel which is given `o` and `l` of the union, for it
computes the weights `exp(scores - l)` from these (Dao et al., "FlashAttention", 2022, arXiv:2205.14135, algorithm 4).

Suffixes: `_THD` tokens of the row, heads, features of a head; `_TH` tokens and heads; `_BL` rows of a batch and tokens.
"""

from collections import defaultdict
from collections.abc import Sequence
from itertools import groupby
from math import log2
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from iiverl_core.training.attention import Segment

CHUNK = 256  # tokens: shorter ones save more scores, but the kernel is slower

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Spans:
    """Ranges of tokens as a batch, padded on the right with copies of their last tokens."""

    def __init__(self, starts: Sequence[int], lengths: Sequence[int]) -> None:
        begin_B, length_B = np.array(starts), np.array(lengths)
        self._count, width = len(begin_B), int(length_B.max())
        places, self._size = np.arange(width), self._count * width
        even = bool((length_B == width).all())
        adjoining = bool((begin_B[1:] == begin_B[:-1] + length_B[:-1]).all())
        self._slice = slice(int(begin_B[0]), int(begin_B[-1] + length_B[-1])) if adjoining else None
        tokens_BL = begin_B[:, None] + np.minimum(places, length_B[:, None] - 1)
        kept = np.flatnonzero(places < length_B[:, None])
        # The token at each place; the places that are no padding, and their tokens.
        self._tokens = None if even and adjoining else torch.from_numpy(tokens_BL.ravel())
        self._kept = None if even else torch.from_numpy(kept)
        self._own = torch.from_numpy(tokens_BL.ravel()[kept])

    def batch(self, row: Tensor) -> Tensor:
        """Take these tokens: (T, H, …) to (B, H, L, …)."""
        taken = row[self._slice] if self._tokens is None else row.index_select(0, self._tokens)
        return taken.unflatten(0, (self._count, -1)).transpose(1, 2)

    def gradients(self, row: Tensor) -> Tensor:
        """Take gradients of these tokens; those of padding are zero."""
        if self._kept is None:
            return self.batch(row)
        padded = row.new_zeros(self._size, *row.shape[1:]).index_copy_(0, self._kept, self.of(row))
        return padded.unflatten(0, (self._count, -1)).transpose(1, 2)

    def tokens(self, batch: Tensor) -> Tensor:
        """Return the tokens of a batch behind one another, without padding: (B, H, L, …) to (tokens, H, …)."""
        flat = batch.transpose(1, 2).flatten(0, 1)
        return flat if self._kept is None else flat.index_select(0, self._kept)

    def of(self, row: Tensor) -> Tensor:
        """Return these tokens of a row behind one another."""
        return row[self._slice] if self._slice is not None else row.index_select(0, self._own)

    def put(self, row: Tensor, tokens: Tensor) -> None:
        """Replace these tokens of a row."""
        if self._slice is not None:
            row[self._slice] = tokens
        else:
            row.index_copy_(0, self._own, tokens)


class Part(NamedTuple):
    """Queries and the keys that they attend to: the row's range of the same number, up to their own token or all of it."""

    queries: Spans
    keys: Spans
    causal: bool


def parts_of(segments: Sequence["Segment"]) -> tuple[list[Part], list[Part]]:
    """Divide what the tokens of a row attend to.

    Returns:
        Parts that together have each token of the row once, and those that add keys to what came before them.
    """
    chunks = [
        (segment.start + before, min(CHUNK, segment.length - before))
        for segment in segments
        for before in range(0, segment.length, CHUNK)
    ]
    runs = (
        Spans(*zip(*run, strict=True)) for _, run in groupby(chunks, key=lambda chunk: length_class(chunk[1]))
    )
    own = [Part(spans, spans, causal=True) for spans in runs]
    later: dict[int, list[Segment]] = defaultdict(list)
    for segment in segments:
        for before in range(CHUNK, segment.length, CHUNK):
            later[before].append(segment)
    added = [
        Part(
            Spans([each.start + before for each in cut], [min(CHUNK, each.length - before) for each in cut]),
            Spans([each.start for each in cut], [before] * len(cut)),
            causal=False,
        )
        for before, cut in later.items()
    ]
    for (start, length), run in groupby(segments, key=lambda each: (each.prefix_start, each.prefix_length)):
        if length:
            continuing = list(run)
            queries = Spans([continuing[0].start], [sum(each.length for each in continuing)])
            added.append(Part(queries, Spans([start], [length]), causal=False))
    return own, added


def length_class(length: int) -> int:
    """Group lengths that differ by at most 15% or 10 tokens, so that padding stays low and batches stay few."""
    return int(5 * log2(1 + length / 64))


def can_compute(query_THD: Tensor, value_THD: Tensor) -> bool:
    """Return whether torch's kernel for CPUs computes this."""
    return query_THD.device.type == "cpu" and query_THD.shape[-1] == value_THD.shape[-1]


def attend(
    query_THD: Tensor,
    key_THD: Tensor,
    value_THD: Tensor,
    parts: tuple[Sequence[Part], Sequence[Part]],
    scale: float | None,
) -> Tensor:
    """Attend as `parts_of` says; keys and values may have fewer heads. See `PackedAttention.attend`."""
    attended: Tensor = _Merged.apply(query_THD, key_THD, value_THD, parts, scale)
    return attended


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        parts: tuple[Sequence[Part], Sequence[Part]],
        scale: float | None,
    ) -> Tensor:
        exact = torch.promote_types(query.dtype, torch.float32)
        attended_THD = torch.empty(query.shape, dtype=exact)
        lse_TH = torch.empty(query.shape[:2], dtype=exact)

        def run(part: Part) -> tuple[Tensor, Tensor]:
            states = part.queries.batch(query), part.keys.batch(key), part.keys.batch(value)
            found = _FORWARD(*states, is_causal=part.causal, scale=scale)
            attended, lse = map(part.queries.tokens, found)
            return attended, lse

        own, added = parts
        for part in own:
            attended, lse = run(part)
            part.queries.put(attended_THD, attended)
            part.queries.put(lse_TH, lse)
        for part in added:
            attended, lse = run(part)
            before = part.queries.of(lse_TH)
            merged = torch.logaddexp(before, lse)
            values = part.queries.of(attended_THD) * (before - merged).exp_()[..., None]
            part.queries.put(attended_THD, values.addcmul_(attended, (lse - merged).exp_()[..., None]))
            part.queries.put(lse_TH, merged)
        attended = attended_THD.to(query.dtype)
        ctx.save_for_backward(query, key, value, attended, lse_TH)
        ctx.parts, ctx.scale = parts, scale
        return attended

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, attended, lse_TH = ctx.saved_tensors
        by_query, by_key, by_value = (torch.empty_like(x) for x in (query, key, value))
        own, added = ctx.parts
        for i, part in enumerate((*own, *added)):
            asked, seen = part.queries, part.keys
            states = (
                asked.batch(query),
                seen.batch(key),
                seen.batch(value),
                asked.batch(attended),
                asked.batch(lse_TH),
            )
            found = _BACKWARD(asked.gradients(gradients[0]), *states, 0.0, part.causal, scale=ctx.scale)
            wholes, spans = (by_query, by_key, by_value), (asked, seen, seen)
            for whole, tokens, batch in zip(wholes, spans, found, strict=True):
                gradient = tokens.tokens(batch)
                tokens.put(whole, gradient if i < len(own) else tokens.of(whole) + gradient)
        return by_query, by_key, by_value, None, None
