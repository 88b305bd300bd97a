"""Attention of a packed row on CPUs: parts of what tokens attend to are computed apart, and merged.

With a mask, a response that continues a prompt is compared with all keys of both, also with the later ones of its own, and
each response has its own copy of the prompt's keys. Without one, torch's kernel still compares blocks of 512 keys. Here
segments are cut into chunks: a chunk attends causally to itself, and fully to the chunks before it. Adjoining responses
to one prompt attend to it in one call, without padding or copies of its keys.

With `o_i` and `l_i`, the attended values and the log-sum-exp of the scores over disjoint sets of keys, attention over
their union has `l = logaddexp(l_1, l_2)` and `o = Σ exp(l_i - l) o_i` (Liu et al., "Ring Attention", 2023,
arXiv:2310.01889). The gradient through each set is that of a kernel which is given `o` and `l` of the union, for it
computes the weights `exp(scores - l)` from these (Dao et al., "FlashAttention", 2022, arXiv:2205.14135, algorithm 4).

There are only first derivatives, and autocast has no effect.

Suffixes: `_THD` tokens of the row, heads, features of a head; `_TH` tokens and heads.
"""

from collections.abc import Sequence
from itertools import groupby
from math import log2
from typing import Any, NamedTuple

import torch
from torch import Tensor

from iiverl_core.training.spans import Segment, Spans

CHUNK = 256  # tokens: shorter ones save more scores, but the kernel is slower
KERNEL_BLOCK = 512  # keys that torch's kernel takes at a time
# What the division into parts saves and costs, measured on two cores:
CALL = 8192  # scores that take as long as a further call, forward and backward, with eight heads or so
GATHER = 16  # scores that take as long as gathering a token's states, and scattering their gradients

_CPU = torch.device("cpu")
_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Part(NamedTuple):
    """Queries, and the keys that they attend to: the i-th range of queries to the i-th of keys, which have one length."""

    queries: Spans
    keys: Spans

    @property
    def causal(self) -> bool:
        """Whether each attends to those before it and itself only."""
        return self.keys is self.queries


class Parts(NamedTuple):
    """What the tokens of a row attend to: `own` has each token once, `added` adds keys to what came before them."""

    own: list[Part]
    added: list[Part]

    @property
    def cost(self) -> int:
        """How long it takes, in scores."""
        total = 0
        for queries, keys in (*self.own, *self.added):
            gathered = sum(spans.count * spans.width for spans in (queries, keys) if not spans.adjoining)
            total += CALL + queries.count * queries.width * keys.width + GATHER * gathered
        return total


def divide(segments: Sequence[Segment], chunk: int = CHUNK) -> Parts:
    """Divide what the tokens of a row attend to; `chunk` is the most tokens of a chunk."""
    chunks = [
        (segment.start + before, min(chunk, segment.length - before))
        for segment in segments
        for before in range(0, segment.length, chunk)
    ]
    own = [Spans(list(run), _CPU) for _, run in groupby(chunks, key=lambda each: length_class(each[1]))]
    added: list[Part] = []
    for before in range(chunk, max(segment.length for segment in segments), chunk):
        longer = [segment for segment in segments if segment.length > before]
        queries = [(each.start + before, min(chunk, each.length - before)) for each in longer]
        keys = [(each.start, before) for each in longer]
        added.append(Part(Spans(queries, _CPU), Spans(keys, _CPU)))
    for prefix, run in groupby(segments, key=lambda each: (each.prefix_start, each.prefix_length)):
        if prefix[1]:
            first, *others = run
            length = first.length + sum(each.length for each in others)
            added.append(Part(Spans([(first.start, length)], _CPU), Spans([prefix], _CPU)))
    return Parts([Part(spans, spans) for spans in own], added)


def length_class(length: int) -> int:
    """Group lengths that differ by at most 15% or 10 tokens, so that padding stays low and batches stay few."""
    return int(5 * log2(1 + length / 64))


def can_compute(query_THD: Tensor, key_THD: Tensor, value_THD: Tensor) -> bool:
    """Return whether torch's kernel for CPUs computes this; it checks nothing itself."""
    return (
        query_THD.device.type == "cpu"
        and query_THD.dtype == key_THD.dtype == value_THD.dtype
        and query_THD.shape[-1] == key_THD.shape[-1]
        and key_THD.shape == value_THD.shape
        and query_THD.shape[1] % key_THD.shape[1] == 0
    )


def attend(
    query_THD: Tensor, key_THD: Tensor, value_THD: Tensor, parts: Parts, scale: float | None
) -> Tensor:
    """Attend as `parts` say; keys and values may have fewer heads. See `PackedAttention.attend`."""
    # The kernel takes it for granted that features are next to each other.
    states = [x if x.stride(-1) == 1 else x.contiguous() for x in (query_THD, key_THD, value_THD)]
    attended: Tensor = _Merged.apply(*states, parts, scale)
    return attended


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, parts: Parts, scale: float | None
    ) -> Tensor:
        summed = torch.promote_types(query.dtype, torch.float32)
        attended_THD = query.new_empty(query.shape, dtype=summed)
        lse_TH = query.new_empty(query.shape[:2], dtype=summed)

        def run(part: Part) -> tuple[Tensor, Tensor]:
            states = part.queries.batch(query), part.keys.batch(key), part.keys.batch(value)
            attended, lse = _FORWARD(*states, is_causal=part.causal, scale=scale)
            return part.queries.tokens(attended), part.queries.tokens(lse)

        for part in parts.own:
            attended, lse = run(part)
            part.queries.put(attended_THD, attended)
            part.queries.put(lse_TH, lse)
        for part in parts.added:
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
        by_state = [torch.empty_like(x) for x in (query, key, value)]

        def run(part: Part, *, first: bool) -> None:
            queries, keys = part.queries, part.keys
            found = _BACKWARD(
                queries.gradients(gradients[0]),
                *(queries.batch(query), keys.batch(key), keys.batch(value)),
                *(queries.batch(attended), queries.batch(lse_TH)),
                *(0.0, part.causal),
                scale=ctx.scale,
            )
            for whole, spans, batch in zip(by_state, (queries, keys, keys), found, strict=True):
                gradient = spans.tokens(batch)
                spans.put(whole, gradient if first else gradient.add_(spans.of(whole)))

        for part in ctx.parts.own:
            run(part, first=True)
        for part in ctx.parts.added:
            run(part, first=False)
        return *by_state, None, None
