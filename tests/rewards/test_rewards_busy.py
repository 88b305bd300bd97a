"""How long scoring took, whatever it overlapped with."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iiverl_core.rewards import FunctionScorer
from iiverl_core.rewards.scorer import covered
from iiverl_reward_client import Scored
from rollouts import id_of


def test_a_function_is_busy_while_it_scores(make_sample) -> None:
    def slow(_):
        time.sleep(0.05)
        return Scored(1.0)

    scorer = FunctionScorer(slow)
    scorer.submit(make_sample("a", key=(0, 0)))
    time.sleep(0.2)  # idle by then
    scorer.submit(make_sample("b", key=(0, 1)))
    scorer.collect([id_of(0, 0), id_of(0, 1)])
    assert 0.1 <= scorer.busy_seconds < 0.2
    scorer.collect([])
    assert scorer.busy_seconds == 0
    scorer.close()


def test_what_overlaps_counts_once() -> None:
    assert covered([]) == 0
    assert covered([(0, 2), (1, 3), (5, 6), (5, 5.5)]) == pytest.approx(4)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 10)), max_size=20))
def test_the_union_by_counting(spans: list[tuple[int, int]]) -> None:
    seconds = {second for start, length in spans for second in range(start, start + length)}
    assert covered([(start, start + length) for start, length in spans]) == len(seconds)
