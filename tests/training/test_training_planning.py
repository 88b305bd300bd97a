"""Balance and micro-batches: nothing lost, budgets kept, ranks in step."""

from hypothesis import given
from hypothesis import strategies as st

from iiverl_core.training.planning import Packing, balance, in_order, micro_batches

LENGTHS = st.lists(st.integers(1, 4000), min_size=0, max_size=60)
RANKS = st.integers(1, 8)
PACKINGS = st.one_of(
    st.builds(Packing, sequences=st.integers(1, 10)),
    st.builds(Packing, tokens=st.integers(1, 9000), padded=st.booleans()),
    st.just(Packing()),
)


@given(LENGTHS, RANKS)
def test_balance_gives_each_sequence_to_one_rank(lengths: list[int], ranks: int) -> None:
    shares = balance(lengths, ranks)
    assert len(shares) == ranks
    assert sorted(i for share in shares for i in share) == list(range(len(lengths)))
    tokens = [sum(lengths[i] for i in share) for share in shares]
    if lengths:  # no rank has more than the mean and one sequence (and what the cost of pairs shifts)
        assert max(tokens) <= sum(lengths) / ranks + 1.2 * max(lengths)


def test_balance_evens_out_what_order_would_not() -> None:
    lengths = [1000, 900, 800, 10, 20, 30]
    tokens = [sum(lengths[i] for i in share) for share in balance(lengths, 2)]
    assert max(tokens) - min(tokens) <= 700
    assert sum(lengths[i] for i in in_order(6, 2)[0]) == 2700


@given(st.integers(0, 100), RANKS)
def test_in_order_cuts_evenly(count: int, ranks: int) -> None:
    shares = in_order(count, ranks)
    assert [i for share in shares for i in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(LENGTHS, RANKS, PACKINGS)
def test_micro_batches_keep_the_budget_and_the_ranks_in_step(
    lengths: list[int], ranks: int, packing: Packing
) -> None:
    shares = balance(lengths, ranks)
    cuts = micro_batches(lengths, shares, packing)
    assert len({len(cut) for cut in cuts}) == 1
    for share, cut in zip(shares, cuts, strict=True):
        assert sorted(i for batch in cut for i in batch) == share
        for batch in cut:
            if packing.sequences is not None:
                assert len(batch) <= packing.sequences
            if packing.tokens is not None and len(batch) > 1:
                width = max((lengths[i] for i in batch), default=0)
                tokens = len(batch) * width if packing.padded else sum(lengths[i] for i in batch)
                assert tokens <= packing.tokens


def test_short_ranks_get_fillers_at_the_end() -> None:
    assert micro_batches([5, 5, 5], [[0, 1], [2]], Packing(sequences=1)) == [[[0], [1]], [[2], []]]


def test_sequences_of_like_length_go_together() -> None:
    cuts = micro_batches([9, 1, 8, 2], [[0, 1, 2, 3]], Packing(sequences=2))
    assert cuts == [[[1, 3], [2, 0]]]
