"""Decisions about the samples of a step: which count, which go into a mini-batch, which rank works on which."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from iiverl_core.algorithms import token_weights
from iiverl_core.cluster.worker import Share
from iiverl_core.errors import IIVerlError
from iiverl_core.rewards import OVERLONG_PENALTY, Key
from iiverl_core.samples import Handle, Sample
from iiverl_core.training.planning import Packing, balance, in_order, micro_batches
from iiverl_reward_client import Outcome, Scored

T = TypeVar("T")


def with_outcomes(samples: Sequence[Sample], outcomes: Mapping[Key, Outcome]) -> list[Sample]:
    """Give each sample its outcome, and put them in the order of groups and members."""
    ordered = sorted(samples, key=lambda sample: (sample.group, sample.member))
    return [replace(sample, outcome=outcomes[sample.group, sample.member]) for sample in ordered]


def comparable(samples: Sequence[Sample], groups: Collection[int], min_group_size: int) -> list[Sample]:
    """Keep the samples of these groups that have a score, where at least `min_group_size` of the group have one."""
    scored = [s for s in samples if s.group in groups and isinstance(s.outcome, Scored)]
    members = Counter(sample.group for sample in scored)
    return [sample for sample in scored if members[sample.group] >= min_group_size]


def informative(samples: Sequence[Sample], metric: str) -> list[int]:
    """Find the groups whose scored members differ in a metric, in the order in which they come.

    `score` is what the scorer gave; `seq_reward` the same after a penalty for length; another name is a component of
    the score.

    Raises:
        IIVerlError: a score does not have that component.
    """
    values: dict[int, set[float]] = {}
    for sample in samples:
        if isinstance(sample.outcome, Scored):
            values.setdefault(sample.group, set()).add(_metric(sample.outcome, metric))
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


def with_arrays(samples: Sequence[Sample], name: str, handles: Sequence[Handle]) -> list[Sample]:
    """Give each sample one more per-token array."""
    return [
        replace(sample, arrays={**sample.arrays, name: handle})
        for sample, handle in zip(samples, handles, strict=True)
    ]


def mini_batch_count(groups: int, groups_a_batch: int) -> int:
    """Say into how many mini-batches groups are cut; the last may be smaller."""
    return -(-groups // groups_a_batch)


def mini_batches(
    samples: Sequence[Sample], groups: Sequence[int], groups_a_batch: int, order: np.random.Generator | None
) -> list[list[Sample]]:
    """Cut a step's samples by their groups, in the order of `groups` or in a random one.

    Groups of which nothing is left leave their mini-batch smaller, so the others stay what they would have been; a
    mini-batch with nothing left is left out.
    """
    places = np.arange(len(groups)) if order is None else order.permutation(len(groups))
    place = dict(zip(groups, places.tolist(), strict=True))
    batches: list[list[Sample]] = [[] for _ in range(mini_batch_count(len(groups), groups_a_batch))]
    for sample in samples:
        batches[place[sample.group] // groups_a_batch].append(sample)
    return [batch for batch in batches if batch]


@dataclass(frozen=True)
class Division:
    """Samples divided over the data-parallel ranks: each rank's share, and the positions its samples came from."""

    shares: list[Share]
    positions: list[list[int]]

    def restore(self, results: Sequence[Sequence[T]]) -> list[T]:
        """Put what each rank gave for its samples back into the order of the samples."""
        flat = {
            position: value
            for positions, values in zip(self.positions, results, strict=True)
            for position, value in zip(positions, values, strict=True)
        }
        return [flat[position] for position in range(len(flat))]


def divide(samples: Sequence[Sample], ranks: int, packing: Packing, *, balanced: bool) -> Division:
    """Divide samples over ranks, and each rank's into micro-batches, for a pass that trains nothing."""
    return _divide(samples, [0.0] * len(samples), ranks, packing, balanced=balanced)


def divide_for_training(
    samples: Sequence[Sample],
    ranks: int,
    packing: Packing,
    *,
    balanced: bool,
    loss_agg_mode: str,
    horizon: float,
    arrays: tuple[str, ...],
) -> Division:
    """Divide a mini-batch over ranks; the weights of its tokens in the loss come from all of it."""
    lengths = [sample.response_length for sample in samples]
    weights = token_weights(loss_agg_mode, lengths, horizon)
    return _divide(
        samples, weights, ranks, packing, balanced=balanced, token_share=1 / sum(lengths), arrays=arrays
    )


def _divide(
    samples: Sequence[Sample],
    weights: Sequence[float],
    ranks: int,
    packing: Packing,
    *,
    balanced: bool,
    token_share: float = 0.0,
    arrays: tuple[str, ...] = (),
) -> Division:
    lengths = [sample.length for sample in samples]
    positions = balance(lengths, ranks) if balanced else in_order(len(lengths), ranks)
    shares = []
    for mine, batches in zip(positions, micro_batches(lengths, positions, packing), strict=True):
        place = {position: i for i, position in enumerate(mine)}  # in the batch → in this rank's share
        shares.append(
            Share(
                samples=[samples[i] for i in mine],
                micro_batches=[[place[i] for i in batch] for batch in batches],
                weights=[weights[i] for i in mine],
                token_share=token_share,
                arrays=arrays,
            )
        )
    return Division(shares, positions)
