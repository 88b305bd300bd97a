"""Balance and micro-batches: nothing lost, budgets kept, ranks in step, prompts computed once where that pays."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iiverl_core.training.planning import (
    PAIRS_PER_TOKEN,
    Packing,
    SequenceSize,
    Work,
    balance,
    in_order,
    micro_batches,
    work_of,
)

LENGTHS = st.lists(st.integers(1, 4000), min_size=0, max_size=60)
RANKS = st.integers(1, 8)
PACKINGS = st.one_of(
    st.builds(Packing, sequences=st.integers(1, 10)),
    st.builds(Packing, tokens=st.integers(1, 9000), layout=st.sampled_from(["padded", "packed"])),
    st.just(Packing()),
)
GROUPS = st.lists(
    st.tuples(st.integers(0, 3000), st.lists(st.integers(1, 4000), min_size=1, max_size=10)), max_size=8
)
"""Groups, each as the tokens of its prompt and those of its responses."""
SHARED_PACKINGS = st.one_of(
    st.builds(Packing, sequences=st.integers(1, 10), layout=st.just("shared")),
    st.builds(Packing, tokens=st.integers(1, 30_000), layout=st.just("shared")),
    st.just(Packing(layout="shared")),
)


def alone(lengths: list[int]) -> list[SequenceSize]:
    return [SequenceSize(n) for n in lengths]


def grouped(groups: list[tuple[int, list[int]]]) -> list[SequenceSize]:
    return [
        SequenceSize(prompt + response, prompt, group)
        for group, (prompt, responses) in enumerate(groups)
        for response in responses
    ]


def computed(sizes: list[SequenceSize], batch: list[int]) -> int:
    """Tokens of a micro-batch: those of its different (group, position), counted one by one."""
    return len(
        {
            (sizes[i].group if token < sizes[i].prefix else ("own", i), token)
            for i in batch
            for token in range(sizes[i].length)
        }
    )


def cost(work: Work) -> float:
    return work.tokens + work.squares / PAIRS_PER_TOKEN


@given(LENGTHS, RANKS)
def test_balance_gives_each_sequence_to_one_rank(lengths: list[int], ranks: int) -> None:
    shares = balance(alone(lengths), ranks)
    assert len(shares) == ranks
    assert sorted(i for share in shares for i in share) == list(range(len(lengths)))
    tokens = [sum(lengths[i] for i in share) for share in shares]
    if lengths:  # no rank has more than the mean and one sequence (and what the cost of pairs shifts)
        assert max(tokens) <= sum(lengths) / ranks + 1.2 * max(lengths)


def test_balance_evens_out_what_order_would_not() -> None:
    lengths = [1000, 900, 800, 10, 20, 30]
    tokens = [sum(lengths[i] for i in share) for share in balance(alone(lengths), 2)]
    assert max(tokens) - min(tokens) <= 700
    assert sum(lengths[i] for i in in_order(6, 2)[0]) == 2700


@given(GROUPS, RANKS)
def test_no_rank_has_much_more_than_the_mean_of_the_shared_work(
    groups: list[tuple[int, list[int]]], ranks: int
) -> None:
    """Beyond the mean, a rank has at most a prompt that another rank has too, and one sequence."""
    sizes = grouped(groups)
    shares = balance(sizes, ranks)
    assert sorted(i for share in shares for i in share) == list(range(len(sizes)))
    if sizes:
        mean = cost(work_of(sizes, [range(len(sizes))])) / ranks
        prompt = max(cost(Work(size.prefix, size.prefix**2)) for size in sizes)
        longest = max(cost(Work(size.length, size.length**2)) for size in sizes)
        most = max(cost(work_of(sizes, [share])) for share in shares)
        assert most <= 1.001 * (mean + prompt + longest)


@pytest.mark.parametrize(("groups", "ranks"), [(8, 4), (8, 8), (48, 16)])
def test_equal_groups_stay_whole_if_ranks_divide_them(groups: int, ranks: int) -> None:
    sizes = grouped([(512, [100, 110, 120, 130])] * groups)
    for share in balance(sizes, ranks):
        assert set(Counter(sizes[i].group for i in share).values()) == {4}


def test_groups_are_cut_where_whole_ones_leave_ranks_idle() -> None:
    """Of three groups over two ranks, one is cut; of one group over four ranks, each has a part."""
    sizes = grouped([(100, [100] * 8)] * 3)
    tokens = [work_of(sizes, [share]).tokens for share in balance(sizes, 2)]
    assert tokens == [1400, 1400]
    assert [len(share) for share in balance(grouped([(100, [100] * 8)]), 4)] == [2] * 4


def test_a_long_prompt_is_not_copied_to_gain_little() -> None:
    """Splitting one of two groups over three ranks saves less than what its prompt costs again."""
    sizes = grouped([(3000, [10] * 4)] * 2)
    shares = balance(sizes, 3)
    assert sorted(map(len, shares)) == [0, 4, 4]


@given(st.integers(0, 100), RANKS)
def test_in_order_cuts_evenly(count: int, ranks: int) -> None:
    shares = in_order(count, ranks)
    assert [i for share in shares for i in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(LENGTHS, RANKS, PACKINGS)
def test_micro_batches_keep_the_budget_and_the_ranks_in_step(
    lengths: list[int], ranks: int, packing: Packing
) -> None:
    sizes = alone(lengths)
    shares = balance(sizes, ranks)
    cuts = micro_batches(sizes, shares, packing)
    assert len({len(cut) for cut in cuts}) == 1
    for share, cut in zip(shares, cuts, strict=True):
        assert sorted(i for batch in cut for i in batch) == share
        for batch in cut:
            if packing.sequences is not None:
                assert len(batch) <= packing.sequences
            if packing.tokens is not None and len(batch) > 1:
                width = max((lengths[i] for i in batch), default=0)
                padded = packing.layout == "padded"
                tokens = len(batch) * width if padded else sum(lengths[i] for i in batch)
                assert tokens <= packing.tokens


@given(GROUPS, RANKS, SHARED_PACKINGS)
def test_budgets_count_a_prompt_once_per_micro_batch(
    groups: list[tuple[int, list[int]]], ranks: int, packing: Packing
) -> None:
    sizes = grouped(groups)
    shares = balance(sizes, ranks)
    cuts = micro_batches(sizes, shares, packing)
    assert len({len(cut) for cut in cuts}) == 1
    for share, cut in zip(shares, cuts, strict=True):
        assert sorted(i for batch in cut for i in batch) == share
        for batch in cut:
            tokens = work_of(sizes, [batch]).tokens
            assert tokens <= sum(sizes[i].length for i in batch)
            if packing.sequences is not None:
                assert len(batch) <= packing.sequences
            if packing.tokens is not None and len(batch) > 1:
                assert tokens <= packing.tokens
    if packing.sequences is not None:
        assert max(map(len, cuts)) == max(-(-len(share) // packing.sequences) for share in shares)


@given(
    st.lists(st.tuples(st.integers(0, 30), st.lists(st.integers(1, 40), min_size=1, max_size=6)), max_size=4)
)
def test_work_counts_the_tokens_and_pairs_that_are_computed(groups: list[tuple[int, list[int]]]) -> None:
    sizes = grouped(groups)
    work = work_of(sizes, [range(len(sizes))])
    assert work.tokens == computed(sizes, list(range(len(sizes))))
    assert work.squares == sum(
        p * p + sum((p + r) ** 2 - p * p for r in responses) for p, responses in groups
    )
    apart = work_of(sizes, [[i] for i in range(len(sizes))])
    assert apart == work_of(alone([size.length for size in sizes]), [range(len(sizes))])


def test_a_group_over_the_budget_is_cut_and_pays_for_its_prompt_in_each_part() -> None:
    sizes = grouped([(100, [100] * 5)])
    assert micro_batches(sizes, [range(5)], Packing(tokens=300, layout="shared")) == [[[0, 1], [2, 3], [4]]]


def test_the_rest_of_a_micro_batch_is_filled_if_a_part_of_a_group_is_worth_its_prompt() -> None:
    """205 tokens of room take a response of 100 tokens behind a prompt of 99, and not behind one of 101."""
    for prompt, expected in ((99, [[0, 1, 2, 3], [4, 5]]), (101, [[0, 1, 2], [3, 4, 5]])):
        sizes = alone([100, 100, 100]) + grouped([(prompt, [100, 110, 120])])
        assert micro_batches(sizes, [range(6)], Packing(tokens=505, layout="shared")) == [expected]


def test_short_ranks_get_fillers_at_the_end() -> None:
    assert micro_batches(alone([5, 5, 5]), [[0, 1], [2]], Packing(sequences=1)) == [[[0], [1]], [[2], []]]


def test_sequences_of_like_length_go_together() -> None:
    cuts = micro_batches(alone([9, 1, 8, 2]), [[0, 1, 2, 3]], Packing(sequences=2))
    assert cuts == [[[1, 3], [2, 0]]]
