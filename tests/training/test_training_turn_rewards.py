"""Rewards of turns: credited where they were earned, and a part of the score."""

from dataclasses import replace

import numpy as np
import pytest

from iiverl_core.algorithms import find_estimator
from iiverl_core.cluster.advantages import compute_advantages
from iiverl_core.cluster.store import LocalStore, open_all, put_all
from iiverl_core.config import RunConfig, build, run_config
from iiverl_core.controller.batch import with_arrays
from iiverl_core.rewards import with_environment
from iiverl_core.samples import TURN_REWARDS, SequenceRef, TokenSequence
from iiverl_reward_client import Failed, Scored
from rollouts import id_of, make_rollout

GAMMA, LAM = 0.9, 0.8
# Two rollouts, the first of two sequences: rewards and values of each trained token, and the score of the rollout.
REWARDS = ([0.0, 0.1, 0.0], [0.0, 0.3], [0.0, 1.5])
VALUES = ([0.2, -0.1, 0.4], [0.3, 0.25], [1.0, -1.0])


def run_of(estimator: str) -> RunConfig:
    algorithm = {"adv_estimator": estimator, "gamma": GAMMA, "lam": LAM}
    run = run_config(build({"algorithm": algorithm, "actor_rollout_ref": {"rollout": {"n": 2}}}))
    return replace(run, rewards=replace(run.rewards, source="environment"))


def sequences(store: LocalStore) -> list[SequenceRef]:
    arrays = []
    for rewards in REWARDS:
        mask = np.array([False, *[True] * len(rewards)])
        zeros = np.zeros(len(mask), dtype=np.float32)
        extras = {TURN_REWARDS: np.array(rewards, dtype=np.float32)}
        arrays.append(TokenSequence(np.arange(len(mask)), mask, zeros, extras))
    refs = [
        SequenceRef(id_of(0, member), handle, len(each.token_ids), each.trained)
        for member, handle, each in zip((0, 0, 1), put_all(store, arrays), arrays, strict=True)
    ]
    values = [np.array(each, dtype=np.float32) for each in VALUES]
    return with_arrays(refs, values=put_all(store, values))


def scores(*more: float) -> list[float]:
    """Each rollout's rewards, as fp32 has them, and what another source adds."""
    rounded = [sum(float(np.float32(r)) for r in each) for each in REWARDS]
    return [rounded[0] + rounded[1] + more[0], rounded[2] + more[1]]


def by_hand(rewards: list[float], values: list[float]) -> list[float]:
    """Returns of generalized advantage estimation (arXiv:1506.02438, equations 11 and 16)."""
    returns, advantage, following = [], 0.0, 0.0
    for reward, value in zip(rewards[::-1], values[::-1], strict=True):
        advantage = reward + GAMMA * following - value + GAMMA * LAM * advantage
        following = value
        returns.append(advantage + value)
    return returns[::-1]


@pytest.mark.parametrize("more", [(0.0, 0.0), (0.5, -2.0)], ids=["alone", "added to another score"])
def test_gae_credits_each_turn(more: tuple[float, float]) -> None:
    store = LocalStore()
    found = compute_advantages(
        run_of("gae"), store, find_estimator("gae"), sequences(store), scores(*more), None, 0.0
    )
    returns = np.concatenate(open_all(store, found.returns))
    first, second = [*REWARDS[0], *REWARDS[1]], list(REWARDS[2])
    first[-1] += more[0]
    second[-1] += more[1]
    expected = by_hand(first, [*VALUES[0], *VALUES[1]]) + by_hand(second, VALUES[2])
    np.testing.assert_allclose(returns, expected, rtol=1e-6)
    np.testing.assert_allclose(found.rewards, scores(*more), rtol=1e-6)


def test_a_group_compares_the_sums() -> None:
    store = LocalStore()
    found = compute_advantages(
        run_of("grpo"), store, find_estimator("grpo"), sequences(store), scores(0.0, 0.0), None, 0.0
    )
    first, _, second = (each[0] for each in open_all(store, found.advantages))
    assert first == pytest.approx(-second) and second > 0
    assert found.means == pytest.approx([first, second])


def test_outcomes_that_rollouts_bring_are_added_or_take_the_place_of_scores() -> None:
    brought = [Scored(1.0, {"steps": 2.0}, {"a": 1}), Scored(1e38), Failed("environment"), None]
    rollouts = [make_rollout(group, outcome=each) for group, each in enumerate(brought)]
    ids = [rollout.id for rollout in rollouts]
    scored = {ids[0]: Scored(0.5, {"right": 1.0}), ids[1]: Failed("timeout"), ids[3]: Scored(2.0)}
    alone, added = (with_environment(rollouts, scored, add=add) for add in (False, True))
    assert alone == {**scored, ids[2]: brought[2]}
    assert added == {
        **alone,
        ids[0]: Scored(1.5, {"steps": 2.0, "right": 1.0, "environment": 1.0, "score": 0.5}, {"a": 1}),
    }
