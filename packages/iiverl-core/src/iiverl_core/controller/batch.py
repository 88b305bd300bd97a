"""Selection of a step's rollouts, and their distribution over mini-batches and ranks."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TypeVar

import numpy as np

from iiverl_core.cluster.messages import RankBatch, StalenessRuns, Trained
from iiverl_core.config import RunConfig
from iiverl_core.errors import IIVerlError
from iiverl_core.rewards import OVERLONG_PENALTY
from iiverl_core.samples import Handle, Rollout, SampleId, SequenceRef, SequenceRefs, WeightsSpan
from iiverl_core.training.aggregation import token_weights
from iiverl_core.training.planning import (
    Packing,
    SequenceSize,
    Work,
    balance,
    in_order,
    micro_batches,
    work_of,
)
from iiverl_reward_client import Outcome, Scored

T = TypeVar("T")


def with_outcomes(rollouts: Sequence[Rollout], outcomes: Mapping[SampleId, Outcome]) -> list[Rollout]:
    """Attach the outcome of each rollout, and sort by group and member."""
    ordered = sorted(rollouts, key=lambda rollout: rollout.id)
    return [replace(rollout, outcome=outcomes[rollout.id]) for rollout in ordered]


def drop_small_groups(
    rollouts: Sequence[Rollout], groups: Collection[int], min_group_size: int
) -> list[Rollout]:
    """Keep the rollouts of these groups that have a score and trained tokens, if their group has enough of them."""
    kept = [
        rollout
        for rollout in rollouts
        if rollout.id.group in groups and isinstance(rollout.outcome, Scored) and rollout.response_length
    ]
    size = Counter(rollout.id.group for rollout in kept)
    return [rollout for rollout in kept if size[rollout.id.group] >= min_group_size]


def groups_with_reward_variance(rollouts: Sequence[Rollout], metric: str) -> list[int]:
    """Find the groups whose scored members differ in a metric, in order of appearance.

    `score` is the scorer's score, `seq_reward` the score after the length penalty; other names are components of the
    score.

    Raises:
        IIVerlError: a score does not have that component.
    """
    values: dict[int, set[float]] = {}
    for rollout in rollouts:
        if isinstance(rollout.outcome, Scored):
            values.setdefault(rollout.id.group, set()).add(_metric(rollout.outcome, metric))
    return [group for group, different in values.items() if len(different) > 1]


def _metric(outcome: Scored, metric: str) -> float:
    if metric == "seq_reward":
        return outcome.score
    if metric == "score":
        return outcome.score - outcome.components.get(OVERLONG_PENALTY, 0.0)
    if metric not in outcome.components:
        raise IIVerlError(
            f"algorithm.filter_groups.metric: a score has no component {metric!r}; it has "
            f"{', '.join(outcome.components) or 'none'}. Use score, or let the reward function return a dict with it."
        )
    return outcome.components[metric]


def trained_sequences(rollouts: Sequence[Rollout]) -> list[SequenceRef]:
    """List the sequences of rollouts that have trained tokens; those of a rollout are consecutive."""
    return [sequence for rollout in rollouts for sequence in rollout.sequences if sequence.trained]


def with_arrays(sequences: Sequence[SequenceRef], **arrays: Sequence[Handle]) -> list[SequenceRef]:
    """Add arrays, by name, to each sequence."""
    rows = zip(*arrays.values(), strict=True)
    return [
        sequence.with_arrays(dict(zip(arrays, row, strict=True)))
        for sequence, row in zip(sequences, rows, strict=True)
    ]


def sums_by_rollout(sequences: Sequence[SequenceRef], sums: Sequence[float]) -> dict[SampleId, float]:
    """Add up a number per sequence over the sequences of each rollout."""
    total: dict[SampleId, float] = {}
    for sequence, value in zip(sequences, sums, strict=True):
        total[sequence.id] = total.get(sequence.id, 0.0) + value
    return total


def mini_batch_count(groups: int, groups_per_batch: int) -> int:
    """Count the mini-batches of a step; the last may be smaller."""
    return -(-groups // groups_per_batch)


def epoch_order(run: RunConfig, role: Trained, step: int, epoch: int) -> np.random.Generator | None:
    """Return the generator that shuffles the groups of a step in an epoch of its updates; None to keep their order."""
    shuffles = run.training(role).shuffle
    return np.random.default_rng([run.data.seed, step, epoch]) if shuffles else None


def mini_batch_groups(
    groups: Sequence[int], groups_per_batch: int, order: np.random.Generator | None
) -> list[list[int]]:
    """Split groups into mini-batches, in the order of `groups` or in a random one."""
    positions = np.arange(len(groups)) if order is None else order.permutation(len(groups))
    batches: list[list[int]] = [[] for _ in range(mini_batch_count(len(groups), groups_per_batch))]
    for group, position in zip(groups, positions.tolist(), strict=True):
        batches[position // groups_per_batch].append(group)
    return batches


def mini_batches(
    sequences: Sequence[SequenceRef],
    groups: Sequence[int],
    groups_per_batch: int,
    order: np.random.Generator | None,
) -> list[list[SequenceRef]]:
    """Split a step's sequences by their groups (`mini_batch_groups`).

    A group without sequences makes its mini-batch smaller and does not affect the others. Empty mini-batches are
    dropped.
    """
    split = mini_batch_groups(groups, groups_per_batch, order)
    batch_of = {group: i for i, batch in enumerate(split) for group in batch}
    batches: list[list[SequenceRef]] = [[] for _ in split]
    for sequence in sequences:
        batches[batch_of[sequence.id.group]].append(sequence)
    return [batch for batch in batches if batch]


def loss_weights(sequences: Sequence[SequenceRef], loss_agg_mode: str, max_tokens_norm: float) -> list[float]:
    """Compute the weight per trained token of each sequence in the loss of a mini-batch.

    Aggregation is over rollouts. A rollout of several sequences has the weight of one, split over its sequences in
    proportion to their trained tokens.
    """
    trained: dict[SampleId, int] = {}
    for sequence in sequences:
        trained[sequence.id] = trained.get(sequence.id, 0) + sequence.trained
    weights = token_weights(loss_agg_mode, list(trained.values()), max_tokens_norm)
    weight = dict(zip(trained, weights, strict=True))
    return [weight[sequence.id] for sequence in sequences]


def staleness_runs(rollout: Rollout, staleness: Mapping[int, int]) -> list[StalenessRuns]:
    """List the staleness, given by version, of the weights that sampled the tokens of each trained sequence.

    Tokens beyond those of the rollout's spans count as of its last version.
    """
    last = staleness[rollout.weights_version]
    spans = rollout.spans or (WeightsSpan(rollout.weights_version, rollout.response_length),)
    sampled = [(staleness[each.version], each.tokens) for each in spans]
    runs: list[StalenessRuns] = []
    for sequence in rollout.sequences:
        own, left = list[tuple[int, int]](), sequence.trained
        while left:
            steps, tokens = sampled.pop(0) if sampled else (last, left)
            own.append((steps, min(tokens, left)))
            if tokens > left:
                sampled.insert(0, (steps, tokens - left))
            left -= own[-1][1]
        if own:
            runs.append(tuple(own))
    return runs


@dataclass(frozen=True)
class Division:
    """Sequences divided over the data-parallel ranks: rank batches, the original positions of their sequences, and work."""

    batches: list[RankBatch]
    positions: list[list[int]]
    work: list[Work]

    def restore(self, results: Sequence[Sequence[T]]) -> list[T]:
        """Put the ranks' results for their sequences back into the order of the sequences."""
        flat = {
            position: value
            for positions, values in zip(self.positions, results, strict=True)
            for position, value in zip(positions, values, strict=True)
        }
        return [flat[position] for position in range(len(flat))]


def divide(sequences: Sequence[SequenceRef], ranks: int, packing: Packing, *, balanced: bool) -> Division:
    """Divide sequences over ranks, and rank batches into micro-batches, for a forward pass."""
    return _divide(sequences, None, ranks, packing, balanced=balanced)


def divide_for_training(
    sequences: Sequence[SequenceRef],
    ranks: int,
    packing: Packing,
    *,
    balanced: bool,
    loss_agg_mode: str,
    max_tokens_norm: float,
    arrays: tuple[str, ...],
    keeps_log_probs: bool = False,
    staleness: Sequence[StalenessRuns] = (),
) -> Division:
    """Divide a mini-batch over ranks; loss weights are computed from all of it. See `RankBatch` for the last arguments."""
    weights = loss_weights(sequences, loss_agg_mode, max_tokens_norm)
    inv_num_tokens = 1 / sum(sequence.trained for sequence in sequences)
    return _divide(
        sequences,
        weights,
        ranks,
        packing,
        balanced=balanced,
        inv_num_tokens=inv_num_tokens,
        arrays=arrays,
        keeps_log_probs=keeps_log_probs,
        staleness=staleness,
    )


def _divide(
    sequences: Sequence[SequenceRef],
    weights: Sequence[float] | None,
    ranks: int,
    packing: Packing,
    *,
    balanced: bool,
    inv_num_tokens: float = 0.0,
    arrays: tuple[str, ...] = (),
    keeps_log_probs: bool = False,
    staleness: Sequence[StalenessRuns] = (),
) -> Division:
    tokens: Counter[int] = Counter()
    for steps, count in chain.from_iterable(staleness):
        tokens[steps] += count
    shares = packing.layout == "shared"
    sizes = [SequenceSize(each.length, each.prefix if shares else 0, each.id.group) for each in sequences]
    positions = balance(sizes, ranks) if balanced else in_order(len(sizes), ranks)
    cuts = micro_batches(sizes, positions, packing)
    batches = []
    for rank_positions, rank_micro_batches in zip(positions, cuts, strict=True):
        index = {
            position: i for i, position in enumerate(rank_positions)
        }  # position in all sequences → position in this rank batch
        batches.append(
            RankBatch(
                sequences=SequenceRefs(sequences[i] for i in rank_positions),
                micro_batches=[[index[i] for i in batch] for batch in rank_micro_batches],
                weights=[weights[i] for i in rank_positions] if weights is not None else [],
                inv_num_tokens=inv_num_tokens,
                arrays=arrays,
                keeps_log_probs=keeps_log_probs,
                staleness=[staleness[i] for i in rank_positions] if staleness else [],
                tokens_by_staleness=dict(tokens),
            )
        )
    return Division(batches, positions, [work_of(sizes, cut) for cut in cuts])
