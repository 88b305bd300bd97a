"""Decisions about samples: which count, which mini-batch, which rank."""

import os
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from iiverl_core.algorithms import AdvantageBatch, AdvantageSettings, Segments, find_estimator
from iiverl_core.controller.batch import (
    divide,
    divide_for_training,
    drop_small_groups,
    groups_with_reward_variance,
    loss_weights,
    mini_batches,
    staleness_runs,
    trained_sequences,
    with_arrays,
    with_outcomes,
)
from iiverl_core.errors import IIVerlError
from iiverl_core.registry import AGGREGATIONS
from iiverl_core.samples import (
    Handle,
    Rollout,
    SampleId,
    SequenceRef,
    SequenceRefs,
    TokenSequence,
    WeightsSpan,
    joined_spans,
)
from iiverl_core.training.layout import lay_out
from iiverl_core.training.planning import Packing
from iiverl_reward_client import Failed, Outcome, Scored
from rollouts import id_of, make_rollout


def test_outcomes_find_their_samples_whatever_the_order() -> None:
    outcomes = {id_of(1, 0): Scored(0.5), id_of(0, 1): Failed("timeout"), id_of(0, 0): Scored(1.0)}
    result = with_outcomes([make_rollout(1, 0), make_rollout(0, 1), make_rollout(0, 0)], outcomes)
    assert [r.id for r in result] == [id_of(0, 0), id_of(0, 1), id_of(1, 0)]
    assert [r.outcome for r in result] == [outcomes[r.id] for r in result]


def test_a_failed_sample_and_one_with_nothing_to_compare_are_left_out() -> None:
    samples = [
        make_rollout(0, 0, outcome=Scored(1.0)),
        make_rollout(0, 1, outcome=Failed("server")),
        make_rollout(1, 0, outcome=Scored(0.0)),
        make_rollout(1, 1, outcome=Failed("server")),
        make_rollout(1, 2, outcome=Scored(0.0)),
    ]
    assert [r.id[2:] for r in drop_small_groups(samples, {0, 1}, 2)] == [(1, 0), (1, 2)]
    assert [r.id[2:] for r in drop_small_groups(samples, {0, 1}, 1)] == [(0, 0), (1, 0), (1, 2)]
    assert drop_small_groups(samples, {0}, 2) == []


def test_groups_that_teach_something_are_those_whose_members_differ() -> None:
    def scored(score: float, penalty: float, right: float) -> Outcome:
        return Scored(score + penalty, {"overlong_penalty": penalty, "right": right})

    samples = [
        make_rollout(4, 0, outcome=scored(1.0, 0.0, 1.0)),
        make_rollout(4, 1, outcome=scored(1.0, -0.5, 1.0)),
        make_rollout(7, 0, outcome=scored(0.0, 0.0, 1.0)),
        make_rollout(7, 1, outcome=scored(1.0, -1.0, 0.0)),
        make_rollout(8, 0, outcome=scored(1.0, 0.0, 0.0)),
        make_rollout(8, 1, outcome=Failed("server")),
    ]
    assert groups_with_reward_variance(samples, "score") == [7]
    assert groups_with_reward_variance(samples, "seq_reward") == [4]
    assert groups_with_reward_variance(samples, "right") == [7]
    with pytest.raises(IIVerlError, match="no component 'acc'; it has overlong_penalty, right"):
        groups_with_reward_variance(samples, "acc")


def advantages(scores: list[list[float | None]]) -> dict[tuple[int, int], float]:
    """GRPO's advantage of each sample that takes part, of one-token responses; None is a failed sample."""
    samples = [
        make_rollout(
            group, member, response_length=1, outcome=Failed("server") if score is None else Scored(score)
        )
        for group, members in enumerate(scores)
        for member, score in enumerate(members)
    ]
    batch = drop_small_groups(samples, range(len(scores)), 2)
    if not batch:
        return {}
    given = AdvantageBatch(
        torch.tensor([s.outcome.score for s in batch]).double(),
        Segments.of([1] * len(batch)),
        torch.tensor([s.id.group for s in batch]),
    )
    values, _ = find_estimator("grpo")(given, AdvantageSettings())
    return {s.id[2:]: value for s, value in zip(batch, values.tolist(), strict=True)}


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


def sequences_of(*rollouts: Rollout) -> list[SequenceRef]:
    return trained_sequences(rollouts)


def test_a_rollout_without_trained_tokens_is_left_out() -> None:
    empty = make_rollout(0, 0, response_length=0, outcome=Scored(1.0))
    rest = [make_rollout(0, member, outcome=Scored(1.0)) for member in (1, 2)]
    assert drop_small_groups([empty, *rest], {0}, 2) == rest
    assert drop_small_groups([empty, rest[0]], {0}, 2) == []


def test_mini_batches_follow_groups_and_lose_only_what_was_dropped() -> None:
    sequences = sequences_of(*(make_rollout(group, member) for group in (0, 1, 3) for member in range(2)))
    batches = mini_batches(sequences, groups=range(6), groups_per_batch=2, order=None)
    assert [[s.id.group for s in batch] for batch in batches] == [[0, 0, 1, 1], [3, 3]]


def test_a_random_order_keeps_groups_together_and_repeats_with_its_seed() -> None:
    sequences = sequences_of(*(make_rollout(group, member) for group in range(8) for member in range(2)))

    def shuffled(seed: int) -> list[list[int]]:
        batches = mini_batches(sequences, range(8), 2, np.random.default_rng(seed))
        return [[s.id.group for s in batch] for batch in batches]

    assert shuffled(0) == shuffled(0) != shuffled(1)
    assert sorted(group for batch in shuffled(0) for group in batch) == sorted(list(range(8)) * 2)
    assert all(batch[0] == batch[1] and batch[2] == batch[3] for batch in shuffled(0))


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=30),
    st.integers(1, 5),
    st.booleans(),
    st.sampled_from(
        [
            Packing(sequences=3),
            Packing(tokens=60),
            Packing(tokens=60, layout="padded"),
            Packing(tokens=60, layout="shared"),
        ]
    ),
)
def test_a_division_gives_everything_once_and_restores_the_order(
    lengths: list[int], ranks: int, balanced: bool, packing: Packing
) -> None:
    sequences = sequences_of(*(make_rollout(i, response_length=n) for i, n in enumerate(lengths)))
    division = divide(sequences, ranks, packing, balanced=balanced)
    assert division.restore([[s.id.group for s in batch.sequences] for batch in division.batches]) == list(
        range(len(sequences))
    )
    for batch in division.batches:
        assert sorted(i for part in batch.micro_batches for i in part) == list(range(len(batch.sequences)))


@given(
    st.lists(  # groups of responses, each with the number of prompt tokens that its context kept
        st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=5),
        min_size=1,
        max_size=5,
    ),
    st.integers(1, 3),
)
def test_a_layout_computes_no_more_than_planned(groups: list[list[tuple[int, int]]], ranks: int) -> None:
    tokens: list[TokenSequence] = []
    references: list[SequenceRef] = []
    for group, members in enumerate(groups):
        prompt = list(range(100, 109))
        for member, (kept, response) in enumerate(members):
            context = prompt[:kept] + [0] * (9 - kept)  # an agent rewrote the rest
            ids = np.full(response, 200 + member)
            tokens.append(TokenSequence.single_turn(context, ids, np.zeros(response, dtype=np.float32)))
            id, prefix = id_of(group, member), tokens[-1].prefix_of(prompt)
            assert prefix == kept
            references.append(SequenceRef(id, Handle(None), 9 + response, response, prefix=prefix))
    division = divide(references, ranks, Packing(tokens=40, layout="shared"), balanced=True)
    for batch, positions, work in zip(division.batches, division.positions, division.work, strict=True):
        columns = 0
        for members in filter(None, batch.micro_batches):
            sequences = [tokens[positions[i]] for i in members]
            shared = [batch.sequences[i].shared for i in members]
            columns += lay_out(sequences, "shared", torch.device("cpu"), shared).input_ids_BL.shape[1]
        assert columns <= work.tokens <= sum(each.length for each in batch.sequences)


def test_a_prefix_leaves_a_sequence_its_last_token() -> None:
    sequence = TokenSequence.untrained([5, 6, 7])
    assert [sequence.prefix_of(prompt) for prompt in ([5, 6, 7, 8], [5, 6, 7], [5, 6], [5, 9], [9])] == [
        2, 2, 2, 1, 0,
    ]  # fmt: skip


ROLLOUTS = st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=4).filter(any), min_size=1, max_size=12)
"""Rollouts, as the numbers of trained tokens of their sequences."""


def several(rollouts: list[list[int]]) -> list[SequenceRef]:
    made = [
        make_rollout(
            i, sequences=tuple(SequenceRef(id_of(i), Handle(None), trained + 7, trained) for trained in each)
        )
        for i, each in enumerate(rollouts)
    ]
    return trained_sequences(made)


@given(ROLLOUTS, st.integers(1, 5))
def test_loss_weights_add_up_over_ranks(rollouts: list[list[int]], ranks: int) -> None:
    division = divide_for_training(
        several(rollouts),
        ranks,
        Packing(sequences=2),
        balanced=True,
        loss_agg_mode="seq-mean-token-mean",
        max_tokens_norm=50,
        arrays=(),
    )
    total = sum(
        weight * s.trained
        for batch in division.batches
        for s, weight in zip(batch.sequences, batch.weights, strict=True)
    )
    assert total == pytest.approx(1)


@pytest.mark.parametrize("mode", AGGREGATIONS)
@given(ROLLOUTS)
def test_a_rollout_of_several_sequences_weighs_as_one_of_the_same_tokens(
    mode: str, rollouts: list[list[int]]
) -> None:
    """However a rollout's trained tokens lie in sequences, each of them has the same weight."""
    split, whole = several(rollouts), several([[sum(each)] for each in rollouts])
    expected = dict(zip((s.id for s in whole), loss_weights(whole, mode, 50), strict=True))
    assert loss_weights(split, mode, 50) == [expected[s.id] for s in split]


def test_the_sequences_of_a_rollout_share_its_weight() -> None:
    sequences = several([[3, 1], [4]])
    weights = loss_weights(sequences, "seq-mean-token-mean", 50)
    shares = [weight * s.trained for weight, s in zip(weights, sequences, strict=True)]
    assert shares == pytest.approx([3 / 8, 1 / 8, 1 / 2])


REFERENCES = st.integers(0, 3).map(lambda i: f"reference {i}")
HANDLES = st.builds(Handle, REFERENCES, st.integers(0, 5))


@given(
    st.lists(
        st.tuples(HANDLES, st.integers(1, 99), st.integers(0, 9), st.lists(HANDLES, min_size=2, max_size=2))
    ),
    st.sampled_from([(), ("advantages",), ("advantages", "old_log_probs")]),
)
def test_references_are_the_same_after_pickling(rows: list[Any], names: tuple[str, ...]) -> None:
    sequences = SequenceRefs(
        SequenceRef(id_of(i, i % 3), tokens, length, 1, prefix, dict(zip(names, arrays, strict=False)))
        for i, (tokens, length, prefix, arrays) in enumerate(rows)
    )
    copy = pickle.loads(pickle.dumps(sequences))
    assert copy == sequences and type(copy) is SequenceRefs
    assert all(type(each.id) is SampleId for each in copy)


def test_a_reference_is_pickled_once_and_the_rest_takes_a_few_bytes_per_sequence() -> None:
    reference = os.urandom(10_000)
    sequences = SequenceRefs(
        SequenceRef(id_of(i), Handle(reference, i), 300, 200, 100, {"advantages": Handle(reference, i)})
        for i in range(1000)
    )
    assert len(pickle.dumps(sequences)) < 2 * 10_000 + 40 * 1000
    copy = pickle.loads(pickle.dumps(sequences))
    assert len({id(each.tokens.ref) for each in copy}) == 1  # a worker fetches it once


def test_arrays_are_added_and_kept() -> None:
    first = with_arrays(sequences_of(make_rollout()), old_log_probs=[Handle("a", 0)])
    second = with_arrays(first, advantages=[Handle("b", 1)])
    assert second[0].arrays == {"old_log_probs": Handle("a", 0), "advantages": Handle("b", 1)}


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=4),
    st.data(),
)
def test_each_trained_token_has_the_age_of_the_weights_that_sampled_it(
    trained: list[int], data: st.DataObject
) -> None:
    """Over the sequences of a rollout, of which those without trained tokens have none."""
    total, ages_of = sum(trained), {version: 7 - version for version in range(3, 8)}
    versions = data.draw(st.lists(st.integers(3, 7), min_size=total, max_size=total).map(sorted))
    spans = joined_spans(*(WeightsSpan(version, 1) for version in versions))
    sequences = tuple(SequenceRef(id_of(), Handle(None), 9, each) for each in trained)
    rollout = make_rollout(sequences=sequences, weights_version=versions[-1] if versions else 7, spans=spans)
    runs = staleness_runs(rollout, ages_of)
    assert [sum(tokens for _, tokens in own) for own in runs] == [each for each in trained if each]
    ages = [steps for own in runs for steps, tokens in own for _ in range(tokens)]
    assert ages == [7 - version for version in versions]
    if spans:  # nothing is known of the last tokens
        cut = make_rollout(sequences=sequences, weights_version=5, spans=(WeightsSpan(4, 1),))
        ages = [steps for own in staleness_runs(cut, ages_of) for steps, tokens in own for _ in range(tokens)]
        assert ages == [3] + [2] * (total - 1)
    alone = make_rollout(sequences=sequences, weights_version=5)
    assert staleness_runs(alone, ages_of) == [((2, each),) for each in trained if each]
