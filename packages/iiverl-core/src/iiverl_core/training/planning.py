"""Who works on what, decided from lengths alone: mini-batches, shares of ranks, micro-batches.

Pure functions of lists of lengths; samples are named by their position in such a list. Losses are normalised over the
whole mini-batch, so nothing decided here can change a gradient, only the time and the memory it takes.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Packing:
    """How to cut a rank's share into micro-batches: at most `sequences` each, or at most `tokens` tokens each.

    With `padded`, tokens are counted as the padded rectangle has them. A single sequence longer than the budget is a
    micro-batch of its own.
    """

    sequences: int | None = None
    tokens: int | None = None
    padded: bool = False


def balance(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Spread sequences over `parts` so that the cost of each part is about the same.

    Longest first, each to the part with the least so far (Graham 1969), where a sequence of L tokens costs L plus a
    little for each pair of its tokens, as attention does. Within a part, positions stay in order.
    """
    cost = [
        length + length * length / 24_000 for length in lengths
    ]  # the pairs weigh as much as the rest at 24k
    heap = [(0.0, part) for part in range(parts)]
    shares: list[list[int]] = [[] for _ in range(parts)]
    for i in sorted(range(len(lengths)), key=lambda i: (-cost[i], i)):
        total, part = heapq.heappop(heap)
        shares[part].append(i)
        heapq.heappush(heap, (total + cost[i], part))
    return [sorted(share) for share in shares]


def in_order(count: int, parts: int) -> list[list[int]]:
    """Cut positions 0 … count-1 into `parts` runs whose sizes differ by at most one."""
    bounds = [count * part // parts for part in range(parts + 1)]
    return [list(range(bounds[part], bounds[part + 1])) for part in range(parts)]


def micro_batches(
    lengths: Sequence[int], shares: Sequence[Sequence[int]], packing: Packing
) -> list[list[list[int]]]:
    """Cut each rank's share into micro-batches, the same number on every rank.

    Sequences of like length go together, so that padding costs little. A rank with too few sequences gets empty
    micro-batches at the end, for which it runs a filler: processes of a sharded model have to go through it together.
    """
    cuts = [_cut(sorted(share, key=lambda i: (lengths[i], i)), lengths, packing) for share in shares]
    count = max((len(cut) for cut in cuts), default=0)
    return [cut + [[] for _ in range(count - len(cut))] for cut in cuts]


def _cut(order: Sequence[int], lengths: Sequence[int], packing: Packing) -> list[list[int]]:
    """Fill one micro-batch after the other. `order` is by rising length, so the newest sequence is the longest."""
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
