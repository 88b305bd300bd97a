"""DAPO's soft overlong punishment, by hand at its edges."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iiverl_core.config import RewardAPIConfig
from iiverl_core.rewards import apply_failure_policy, shape_overlong
from iiverl_reward_client import Failed, Scored


@pytest.mark.parametrize(
    ("length", "penalty"),
    [(0, 0.0), (1, 0.0), (16, 0.0), (17, -0.25), (18, -0.5), (19, -0.75), (20, -1.0)],
)
@pytest.mark.parametrize("factor", [1.0, 0.5, 0.0])
def test_the_last_tokens_cost_ever_more(length: int, penalty: float, factor: float) -> None:
    outcomes = {(0, 0): Scored(2.0, {"format": 1.0}, {"seconds": 3})}
    shaped = shape_overlong(outcomes, {(0, 0): length}, limit=20, buffer=4, factor=factor)
    expected = penalty * factor
    assert shaped == {
        (0, 0): Scored(2.0 + expected, {"format": 1.0, "overlong_penalty": expected}, {"seconds": 3})
    }
    assert outcomes == {(0, 0): Scored(2.0, {"format": 1.0}, {"seconds": 3})}


def test_a_buffer_as_long_as_the_limit_reaches_back_to_the_first_token() -> None:
    shaped = shape_overlong({(0, 0): Scored(0.0)}, {(0, 0): 1}, limit=4, buffer=4, factor=1.0)
    assert shaped[0, 0] == Scored(-0.25, {"overlong_penalty": -0.25})


def test_what_failed_stays_failed_and_a_constant_in_its_place_stays_the_constant() -> None:
    failed = {(0, 0): Failed("timeout", 3, "no answer")}
    constant = apply_failure_policy(failed, RewardAPIConfig(on_failure="constant", failure_score=-1.0))
    for outcomes in (failed, constant):
        assert shape_overlong(outcomes, {(0, 0): 20}, limit=20, buffer=4, factor=1.0) == outcomes


@pytest.mark.parametrize("buffer", [0, -1, 21])
def test_a_buffer_outside_the_response_is_refused(buffer: int) -> None:
    with pytest.raises(ValueError, match=f"the buffer is {buffer} tokens"):
        shape_overlong({}, {}, limit=20, buffer=buffer, factor=1.0)


@given(st.data(), st.integers(1, 50), st.floats(0, 5))
def test_the_penalty_falls_with_the_length_from_zero_to_the_factor(data, limit: int, factor: float) -> None:
    buffer = data.draw(st.integers(1, limit))
    keys = {(length, 0): length for length in range(limit + 1)}
    shaped = shape_overlong(dict.fromkeys(keys, Scored(0.0)), keys, limit=limit, buffer=buffer, factor=factor)
    penalties = [shaped[key].score for key in sorted(keys)]
    assert penalties == sorted(penalties, reverse=True)
    assert set(penalties[: limit - buffer + 1]) == {0.0}
    assert penalties[limit] == pytest.approx(-factor)
