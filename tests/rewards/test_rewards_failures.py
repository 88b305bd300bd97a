"""How many failures a step survives, and what is told when there are more."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iiverl_core.errors import IIVerlError
from iiverl_core.rewards import TooManyFailures, check_failures
from iiverl_reward_client import Failed, Scored


def step(*outcomes):
    return {(i, 0): outcome for i, outcome in enumerate(outcomes)}


def test_failures_are_counted_by_kind_most_frequent_first():
    outcomes = step(Failed("timeout"), *[Failed("server")] * 2, *[Scored(1.0)] * 7)
    assert list(check_failures(outcomes, 0.5).items()) == [("server", 2), ("timeout", 1)]


def test_a_step_without_failures_or_without_samples_passes():
    assert check_failures(step(Scored(0.0), Scored(1.0)), 0.0) == {}
    assert check_failures({}, 0.0) == {}


def test_the_diagnosis_names_shares_kinds_and_three_distinct_details():
    failures = [Failed("function", detail=f"ZeroDivisionError {i % 5}\nsecond line") for i in range(10)]
    outcomes = step(*failures, Failed("timeout", detail="30 s"), *[Scored(1.0)] * 9)
    with pytest.raises(TooManyFailures) as caught:
        check_failures(outcomes, 0.1)
    lines = str(caught.value).splitlines()
    assert lines[0] == "11 of 20 samples could not be scored (55.0%): function 10, timeout 1."
    assert lines[1:7] == [
        line for i in range(3) for line in (f"  function: ZeroDivisionError {i}", "    second line")
    ]
    assert lines[7] == "  … and 3 other messages"
    assert lines[8].startswith(
        "reward_api.max_failed_fraction allows 10.0%. What to do: fix the reward function"
    )
    assert isinstance(caught.value, IIVerlError)


def test_a_step_without_any_score_stops_the_run_whatever_may_fail():
    with pytest.raises(TooManyFailures, match="2 of 2 samples could not be scored"):
        check_failures(step(Failed("transport"), Failed("transport")), 1.0)


@given(st.integers(0, 40), st.integers(0, 40), st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0]))
def test_the_run_stops_exactly_above_the_limit(failed, scored, limit):
    outcomes = step(*[Failed("server")] * failed, *[Scored(1.0)] * scored)
    if failed and (scored == 0 or failed > limit * (failed + scored)):
        with pytest.raises(TooManyFailures):
            check_failures(outcomes, limit)
    else:
        assert sum(check_failures(outcomes, limit).values()) == failed
