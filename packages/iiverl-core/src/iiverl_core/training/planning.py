"""Distribution of work over ranks and micro-batches, decided from lengths and common prefixes alone.

Pure functions of lists of `SequenceSize`; sequences are identified by their position in such a list. Losses are
normalised over the whole mini-batch, so these decisions cannot change a gradient, only the time and the memory it takes.

Sequences with a common prefix are computed with one copy of it if they are in one micro-batch (`training.layout`), so
their group is kept together where that saves more than it unbalances.
"""

import heapq
from bisect import bisect_right
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from iiverl_core.training.backend import LayoutKind

PAIRS_PER_TOKEN = 24_000  # attention to that many tokens costs about as much as the rest of a model
SLICE_PRECISION = 1e-3
CLOSE_TO_MEAN = 1.01  # the highest cost of a part that is not improved, over the mean


class SequenceSize(NamedTuple):
    """A sequence of `length` tokens. Those of one `group` with the same `prefix` have that many first tokens in common.

    `prefix` is less than `length`, and 0 if nothing is shared.
    """

    length: int
    prefix: int = 0
    group: Hashable = None


@dataclass(frozen=True)
class Work:
    """What a model computes: `tokens`, without padding, and the sum of the squared lengths that they attend over.

    A sequence that continues a prefix of P tokens up to length L adds L² - P².
    """

    tokens: int = 0
    squares: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.tokens + other.tokens, self.squares + other.squares)


@dataclass(frozen=True)
class Packing:
    """Limits on a micro-batch of a rank batch: at most `sequences` sequences, or at most `tokens` tokens.

    Tokens are those that a model of this `layout` computes: with padding if rows are padded, with one copy of each prefix
    if prefixes are shared. A single sequence longer than the budget is a micro-batch of its own.
    """

    sequences: int | None = None
    tokens: int | None = None
    layout: LayoutKind = "packed"


def balance(sizes: Sequence[SequenceSize], parts: int) -> list[list[int]]:
    """Distribute sequences over `parts` so that the highest cost of a part is low.

    A sequence of L tokens costs L plus a term for each pair of its tokens, as in attention; a part pays for a prefix
    once. Three divisions are tried, until the highest cost is close to the mean: whole groups, longest first, each to the
    part with the lowest cost so far (Graham 1969); one group after the other, cut where a part is full; and single
    sequences, longest first. The best is taken. Within a part, positions stay in order.
    """
    groups = _groups(sizes, range(len(sizes)))
    costs = _Costs.of(sizes)
    enough = CLOSE_TO_MEAN * _cost(work_of(sizes, [range(len(sizes))])) / parts
    best, highest = _longest_first(sizes, costs, groups, parts)
    if highest > enough and len(groups) < len(sizes):
        division = _slices(costs, groups, parts)
        cost = max(_cost(work_of(sizes, [part])) for part in division)
        best, highest = (division, cost) if cost < highest else (best, highest)
    if highest > enough and len(groups) < len(sizes):
        division, cost = _longest_first(sizes, costs, [[i] for i in range(len(sizes))], parts)
        best = division if cost < highest else best
    return [sorted(part) for part in best]


def in_order(count: int, parts: int) -> list[list[int]]:
    """Split positions 0 … count-1 into `parts` runs whose sizes differ by at most one."""
    bounds = [count * part // parts for part in range(parts + 1)]
    return [list(range(bounds[part], bounds[part + 1])) for part in range(parts)]


def micro_batches(
    sizes: Sequence[SequenceSize], rank_batches: Sequence[Sequence[int]], packing: Packing
) -> list[list[list[int]]]:
    """Split each rank batch into micro-batches, the same number on every rank.

    Sequences with a common prefix go together, then those of similar length, to keep padding low. A rank with too few
    sequences gets empty micro-batches at the end, for which it runs a dummy micro-batch: processes of a sharded model
    must run it together.
    """
    cuts = [_cut(sizes, rank_batch, packing) for rank_batch in rank_batches]
    count = max((len(cut) for cut in cuts), default=0)
    return [cut + [[] for _ in range(count - len(cut))] for cut in cuts]


def work_of(sizes: Sequence[SequenceSize], batches: Iterable[Sequence[int]]) -> Work:
    """Add up the work of micro-batches, each of which computes a prefix once."""
    tokens = squares = 0
    for batch in batches:
        prefixes: dict[Hashable, int] = {}
        for length, prefix, group in (sizes[i] for i in batch):
            tokens += length - prefix
            squares += length * length - prefix * prefix
            if prefix:
                prefixes[group, prefix] = prefix
        tokens += sum(prefixes.values())
        squares += sum(prefix * prefix for prefix in prefixes.values())
    return Work(tokens, squares)


def _cost(work: Work) -> float:
    """Convert work to tokens of a short sequence."""
    return work.tokens + work.squares / PAIRS_PER_TOKEN


@dataclass(frozen=True)
class _Costs:
    """The cost of each sequence behind its prefix, and of its prefix."""

    own: list[float]
    prefix: list[float]

    @classmethod
    def of(cls, sizes: Sequence[SequenceSize]) -> "_Costs":
        whole = [length + length * length / PAIRS_PER_TOKEN for length, _, _ in sizes]
        prefix = [n + n * n / PAIRS_PER_TOKEN for _, n, _ in sizes]
        return cls([a - b for a, b in zip(whole, prefix, strict=True)], prefix)


def _groups(sizes: Sequence[SequenceSize], positions: Iterable[int]) -> list[list[int]]:
    """Collect positions that share a prefix, in order of appearance; a sequence that shares none is alone."""
    groups: dict[Hashable, list[int]] = {}
    for i in positions:
        _, prefix, group = sizes[i]
        groups.setdefault((group, prefix) if prefix else i, []).append(i)
    return list(groups.values())


def _longest_first(
    sizes: Sequence[SequenceSize], costs: _Costs, pieces: Sequence[Sequence[int]], parts: int
) -> tuple[list[list[int]], float]:
    """Distribute pieces of groups, the most expensive first, each to the part with the lowest cost so far.

    Returns the division, and its highest cost.
    """
    own = [sum([costs.own[i] for i in piece]) for piece in pieces]
    prefix = [costs.prefix[piece[0]] for piece in pieces]
    heap = [(0.0, part) for part in range(parts)]
    division: list[list[int]] = [[] for _ in range(parts)]
    paid: list[set[Hashable]] = [set() for _ in range(parts)]
    for k in sorted(range(len(pieces)), key=lambda k: (-own[k] - prefix[k], k)):
        total, part = heapq.heappop(heap)
        key = sizes[pieces[k][0]][1:]
        if prefix[k] and key not in paid[part]:
            paid[part].add(key)
            total += prefix[k]
        division[part] += pieces[k]
        heapq.heappush(heap, (total + own[k], part))
    return division, max(heap)[0]


def _slices(costs: _Costs, groups: Sequence[Sequence[int]], parts: int) -> list[list[int]]:
    """Cut the row of all groups into `parts` slices, so that the highest cost of a slice is lowest.

    A part whose slice begins within a group pays for that group's prefix again.
    """
    order = [i for group in groups for i in group]
    again = [  # when a slice begins there
        costs.prefix[i] if k else 0.0 for group in groups for k, i in enumerate(group)
    ]
    before = [0.0]
    for i, prefix in zip(order, again, strict=True):
        before.append(before[-1] + costs.own[i] + costs.prefix[i] - prefix)

    def cut(limit: float) -> list[int]:
        """Fill slices up to a cost, with one sequence at least; return the beginnings of all and the last one's end."""
        bounds = [0]
        while bounds[-1] < len(order) and len(bounds) <= parts:
            start = bounds[-1]
            end = bisect_right(before, before[start] + limit - again[start]) - 1
            bounds.append(max(end, start + 1))
        return bounds

    low, high = before[-1] / parts, before[-1]
    while high - low > low * SLICE_PRECISION:
        middle = (low + high) / 2
        low, high = (low, middle) if cut(middle)[-1] == len(order) else (middle, high)
    bounds = cut(high)
    bounds += [len(order)] * (parts + 1 - len(bounds))
    return [order[start:end] for start, end in pairwise(bounds)]


@dataclass
class _Filling:
    """A micro-batch that is being filled within the limits of `packing`; `tokens` as the layout computes them."""

    packing: Packing
    positions: list[int] = field(default_factory=list)
    tokens: int = 0

    def add(self, sizes: Sequence[SequenceSize], group: Sequence[int]) -> int:
        """Add sequences with a common prefix, by increasing length, as many as fit; return how many."""
        prefix, old = sizes[group[0]].prefix, len(self.positions)
        tokens = self.tokens + prefix
        end = 0
        for i in group:
            length = sizes[i].length
            count = old + end + 1
            more = count * length if self.packing.layout == "padded" else tokens + length - prefix
            if count > 1 and not self._allows(count, more):
                break
            tokens, end = more, end + 1
        # A part of a group costs a copy of its prefix: it has to fill up more room than that.
        whole = (
            end == len(group) or not old or self.packing.tokens is None or self.packing.sequences is not None
        )
        if not whole and tokens - self.tokens <= 2 * prefix:
            return 0
        if end:
            self.positions += group[:end]
            self.tokens = tokens
        return end

    def _allows(self, sequences: int, tokens: int) -> bool:
        if self.packing.sequences is not None:
            return sequences <= self.packing.sequences
        return self.packing.tokens is None or tokens <= self.packing.tokens


def _cut(sizes: Sequence[SequenceSize], rank_batch: Sequence[int], packing: Packing) -> list[list[int]]:
    """Fill one micro-batch after the other with groups, those of the shortest sequences first."""
    order = sorted(rank_batch, key=lambda i: (sizes[i].length, i))
    groups = _groups(sizes, order)
    groups.sort(key=lambda group: sizes[group[-1]].length)  # stable: by the longest of each
    filled = [_Filling(packing)]
    for group in groups:
        start = 0
        while start < len(group):
            added = filled[-1].add(sizes, group[start:])
            start += added
            if start < len(group):
                filled.append(_Filling(packing))
    return [each.positions for each in filled if each.positions]
