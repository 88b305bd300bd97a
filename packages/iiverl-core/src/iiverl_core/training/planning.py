"""Distribution of work over ranks and micro-batches, decided from lengths alone.

Pure functions of lists of lengths; samples are identified by their position in such a list. Losses are normalised over
the whole mini-batch, so these decisions cannot change a gradient, only the time and the memory it takes.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Packing:
    """Limits on a micro-batch of a rank batch: at most `sequences` sequences, or at most `tokens` tokens.

    With `padded`, padding tokens are counted too. A single sequence longer than the budget is a micro-batch of its own.
    """

    sequences: int | None = None
    tokens: int | None = None
    padded: bool = False


def balance(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Distribute sequences over `parts` so that the cost of each part is about the same.

    Longest first, each goes to the part with the lowest cost so far (Graham 1969), where a sequence of L tokens costs L
    plus a term for each pair of its tokens, as in attention. Within a part, positions stay in order.
    """
    cost = [length + length * length / 24_000 for length in lengths]  # both terms are equal at 24k tokens
    heap = [(0.0, part) for part in range(parts)]
    rank_batches: list[list[int]] = [[] for _ in range(parts)]
    for i in sorted(range(len(lengths)), key=lambda i: (-cost[i], i)):
        total, part = heapq.heappop(heap)
        rank_batches[part].append(i)
        heapq.heappush(heap, (total + cost[i], part))
    return [sorted(rank_batch) for rank_batch in rank_batches]


def in_order(count: int, parts: int) -> list[list[int]]:
    """Split positions 0 … count-1 into `parts` runs whose sizes differ by at most one."""
    bounds = [count * part // parts for part in range(parts + 1)]
    return [list(range(bounds[part], bounds[part + 1])) for part in range(parts)]


def micro_batches(
    lengths: Sequence[int], rank_batches: Sequence[Sequence[int]], packing: Packing
) -> list[list[list[int]]]:
    """Split each rank batch into micro-batches, the same number on every rank.

    Sequences of similar length are grouped, to keep padding low. A rank with too few sequences gets empty micro-batches
    at the end, for which it runs a dummy micro-batch: processes of a sharded model must run it together.
    """
    cuts = [
        _cut(sorted(rank_batch, key=lambda i: (lengths[i], i)), lengths, packing)
        for rank_batch in rank_batches
    ]
    count = max((len(cut) for cut in cuts), default=0)
    return [cut + [[] for _ in range(count - len(cut))] for cut in cuts]


def _cut(order: Sequence[int], lengths: Sequence[int], packing: Packing) -> list[list[int]]:
    """Fill one micro-batch after the other. `order` is by increasing length, so the last sequence is the longest."""
    batches: list[list[int]] = []
    for i in order:
        if not batches or not _fits(batches[-1], i, lengths, packing):
            batches.append([])
        batches[-1].append(i)
    return batches


def _fits(batch: Sequence[int], i: int, lengths: Sequence[int], packing: Packing) -> bool:
    if packing.sequences is not None:
        return len(batch) < packing.sequences
    if packing.tokens is None:
        return True
    tokens = (len(batch) + 1) * lengths[i] if packing.padded else sum(lengths[j] for j in batch) + lengths[i]
    return tokens <= packing.tokens
