"""Decisions about samples: which count, which mini-batch, which rank."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from iiverl_core.algorithms import AdvantageBatch, AdvantageSettings, Segments, find_estimator
from iiverl_core.controller.batch import (
    comparable,
    divide,
    divide_for_training,
    informative,
    mini_batches,
    with_arrays,
    with_outcomes,
)
from iiverl_core.errors import IIVerlError
from iiverl_core.samples import Handle, Prompt, Sample
from iiverl_core.training.planning import Packing
from iiverl_reward_client import Failed, Outcome, Scored


def sample(group: int, member: int, length: int = 3, outcome: Outcome | None = None) -> Sample:
    return Sample(
        prompt=Prompt(row=group, ids=(1, 2), text="p"),
        group=group,
        member=member,
        text="r",
        raw_text="r<end>",
        response_length=length,
        finish_reason="stop",
        weights_version=0,
        log_prob=-1.0,
        tokens=Handle(None),
        outcome=outcome,
    )


def test_outcomes_find_their_samples_whatever_the_order() -> None:
    outcomes = {(1, 0): Scored(0.5), (0, 1): Failed("timeout"), (0, 0): Scored(1.0)}
    result = with_outcomes([sample(1, 0), sample(0, 1), sample(0, 0)], outcomes)
    assert [(s.group, s.member) for s in result] == [(0, 0), (0, 1), (1, 0)]
    assert [s.outcome for s in result] == [outcomes[0, 0], outcomes[0, 1], outcomes[1, 0]]


def test_a_failed_sample_and_one_with_nothing_to_compare_are_left_out() -> None:
    samples = [
        sample(0, 0, outcome=Scored(1.0)),
        sample(0, 1, outcome=Failed("server")),
        sample(1, 0, outcome=Scored(0.0)),
        sample(1, 1, outcome=Failed("server")),
        sample(1, 2, outcome=Scored(0.0)),
    ]
    assert [(s.group, s.member) for s in comparable(samples, {0, 1}, 2)] == [(1, 0), (1, 2)]
    assert [(s.group, s.member) for s in comparable(samples, {0, 1}, 1)] == [(0, 0), (1, 0), (1, 2)]
    assert comparable(samples, {0}, 2) == []


def test_groups_that_teach_something_are_those_whose_members_differ() -> None:
    def scored(score: float, penalty: float, right: float) -> Outcome:
        return Scored(score + penalty, {"overlong_penalty": penalty, "right": right})

    samples = [
        sample(4, 0, outcome=scored(1.0, 0.0, 1.0)),
        sample(4, 1, outcome=scored(1.0, -0.5, 1.0)),
        sample(7, 0, outcome=scored(0.0, 0.0, 1.0)),
        sample(7, 1, outcome=scored(1.0, -1.0, 0.0)),
        sample(8, 0, outcome=scored(1.0, 0.0, 0.0)),
        sample(8, 1, outcome=Failed("server")),
    ]
    assert informative(samples, "score") == [7]
    assert informative(samples, "seq_reward") == [4]
    assert informative(samples, "right") == [7]
    with pytest.raises(IIVerlError, match="no component 'acc'; it has overlong_penalty, right"):
        informative(samples, "acc")


def advantages(scores: list[list[float | None]]) -> dict[tuple[int, int], float]:
    """GRPO's advantage of each sample that takes part, of one-token responses; None is a failed sample."""
    samples = [
        sample(group, member, 1, Failed("server") if score is None else Scored(score))
        for group, members in enumerate(scores)
        for member, score in enumerate(members)
    ]
    batch = comparable(samples, range(len(scores)), 2)
    if not batch:
        return {}
    given = AdvantageBatch(
        torch.tensor([s.outcome.score for s in batch]).double(),
        Segments.of([1] * len(batch)),
        torch.tensor([s.group for s in batch]),
    )
    values, _ = find_estimator("grpo")(given, AdvantageSettings())
    return {(s.group, s.member): value for s, value in zip(batch, values.tolist(), strict=True)}


@given(
    st.lists(
        st.lists(st.tuples(st.sampled_from([0.0, 1.0]), st.booleans()), min_size=2, max_size=8),
        min_size=1,
        max_size=4,
    )
)
def test_failures_turn_no_survivor_s_advantage_around(groups: list[list[tuple[float, bool]]]) -> None:
    """Where a response is right or wrong, the right ones never lose and the wrong ones never gain by others' failures."""
    perfect = advantages([[score for score, _ in group] for group in groups])
    with_failures = advantages([[None if failed else score for score, failed in group] for group in groups])
    for key, value in with_failures.items():
        assert value * perfect[key] >= -1e-9
        assert abs(value) < 1e-9 or (value > 0) == (groups[key[0]][key[1]][0] == 1.0)


def test_between_more_than_two_scores_a_baseline_of_survivors_can_turn_one_around() -> None:
    """0.4 is worse than the mean of all four, and better than the mean of the two that are left."""
    assert advantages([[0.4, 0.0, 1.0, 1.0]])[0, 0] < 0 < advantages([[0.4, 0.0, None, None]])[0, 0]


def test_mini_batches_follow_groups_and_lose_only_what_was_dropped() -> None:
    samples = [sample(group, member) for group in (0, 1, 3) for member in range(2)]
    batches = mini_batches(samples, groups=range(6), groups_a_batch=2, order=None)
    assert [[s.group for s in batch] for batch in batches] == [[0, 0, 1, 1], [3, 3]]


def test_a_random_order_keeps_groups_together_and_repeats_with_its_seed() -> None:
    samples = [sample(group, member) for group in range(8) for member in range(2)]

    def shuffled(seed: int) -> list[list[int]]:
        batches = mini_batches(samples, range(8), 2, np.random.default_rng(seed))
        return [[s.group for s in batch] for batch in batches]

    assert shuffled(0) == shuffled(0) != shuffled(1)
    assert sorted(group for batch in shuffled(0) for group in batch) == sorted(list(range(8)) * 2)
    assert all(batch[0] == batch[1] and batch[2] == batch[3] for batch in shuffled(0))


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=30),
    st.integers(1, 5),
    st.booleans(),
    st.sampled_from([Packing(sequences=3), Packing(tokens=60), Packing(tokens=60, padded=True)]),
)
def test_a_division_gives_everything_once_and_restores_the_order(
    lengths: list[int], ranks: int, balanced: bool, packing: Packing
) -> None:
    samples = [sample(i, 0, length) for i, length in enumerate(lengths)]
    division = divide(samples, ranks, packing, balanced=balanced)
    assert division.restore([[s.group for s in share.samples] for share in division.shares]) == list(
        range(len(samples))
    )
    for share in division.shares:
        assert sorted(i for batch in share.micro_batches for i in batch) == list(range(len(share.samples)))


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 5))
def test_loss_weights_add_up_over_ranks(lengths: list[int], ranks: int) -> None:
    samples = [sample(i, 0, length) for i, length in enumerate(lengths)]
    division = divide_for_training(
        samples,
        ranks,
        Packing(sequences=2),
        balanced=True,
        loss_agg_mode="seq-mean-token-mean",
        horizon=50,
        arrays=(),
    )
    total = sum(
        weight * s.response_length
        for share in division.shares
        for s, weight in zip(share.samples, share.weights, strict=True)
    )
    assert total == pytest.approx(1)


def test_arrays_are_added_and_kept() -> None:
    first = with_arrays([sample(0, 0)], "old_log_probs", [Handle("a", 0)])
    second = with_arrays(first, "advantages", [Handle("b", 1)])
    assert second[0].arrays == {"old_log_probs": Handle("a", 0), "advantages": Handle("b", 1)}
