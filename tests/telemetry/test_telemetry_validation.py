"""The metrics of a validation, by hand and by their properties."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iiverl_core.samples import Rollout
from iiverl_core.telemetry import validation_metrics
from iiverl_core.telemetry.validation import best_of, majority
from iiverl_reward_client import Failed, Outcome, Scored

FAILED = Failed("timeout")


@pytest.fixture
def samples(make_sample: Callable[..., Rollout]) -> Callable[..., list[Rollout]]:
    """Makes the samples of some prompts, given the outcome (or score) of each of their responses."""

    def make(*prompts: list[Outcome | float], source: str = "org/set", first: int = 0) -> list[Rollout]:
        made = []
        for group, outcomes in enumerate(prompts):
            for member, outcome in enumerate(outcomes):
                outcome = Scored(outcome) if isinstance(outcome, float | int) else outcome
                sample = make_sample(group, member, outcome=outcome)
                row = replace(sample.prompt, row=first + group, data_source=source)
                made.append(replace(sample, prompt=row))
        return made

    return make


def scores(metrics: dict[str, float]) -> dict[str, float]:
    prefix = "val/test_score/"
    return {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}


def test_one_response_a_prompt_has_a_mean_for_each_data_source(samples) -> None:
    metrics = validation_metrics(samples([1.0], [0.0], source="a") + samples([0.5], source="", first=2))
    assert scores(metrics) == {"a": 0.5, "unknown": 0.5}
    assert metrics["val/failed"] == 0
    assert metrics["val/response_length/mean"] == 5
    assert metrics["val/response_length/clip_ratio"] == 0


def test_several_responses_by_hand(samples) -> None:
    # Of the pairs of 0, 0, 1, 4 the best are 0, 1, 1, 4, 4, 4; those of 2, 2, 2, 2 are all 2.
    metrics = scores(validation_metrics(samples([0.0, 4.0, 0.0, 1.0], [2.0] * 4)))
    assert metrics == {
        "org/set": pytest.approx(13 / 8),
        "org/set/mean@4": pytest.approx(13 / 8),
        "org/set/best@2": pytest.approx((14 / 6 + 2) / 2),
        "org/set/best@4": pytest.approx(3),
        "org/set/worst@4": pytest.approx(1),
    }


@pytest.mark.parametrize(
    ("n", "ks"),
    [(2, [2]), (3, [2, 3]), (4, [2, 4]), (8, [2, 4, 8]), (10, [2, 4, 8, 10]), (17, [2, 4, 8, 16, 17])],
)
def test_best_is_told_for_powers_of_two_and_all(samples, n: int, ks: list[int]) -> None:
    told = scores(validation_metrics(samples([1.0] * n)))
    assert [name for name in told if "best" in name] == [f"org/set/best@{k}" for k in ks]


def test_failures_are_left_out_and_counted(samples) -> None:
    metrics = validation_metrics(samples([1.0, FAILED, 0.0, FAILED], [0.5] * 4, [FAILED] * 4))
    told = scores(metrics)
    assert metrics["val/failed"] == 6
    assert told["org/set"] == pytest.approx(3 / 6)  # responses
    assert told["org/set/mean@4"] == pytest.approx(0.5)  # prompts
    assert told["org/set/best@4"] == told["org/set/best@2"] == pytest.approx((1 + 0.5) / 2)
    assert told["org/set/worst@4"] == pytest.approx(0.25)


def test_a_data_source_of_failures_has_no_score(samples) -> None:
    assert validation_metrics(samples([FAILED, FAILED]))["val/failed"] == 2
    assert scores(validation_metrics(samples([FAILED, FAILED]))) == {}
    assert validation_metrics([]) == {"val/failed": 0.0}


def test_a_constant_in_place_of_a_score_is_a_failure_too(samples) -> None:
    metrics = validation_metrics(samples([Scored(0.0, info={"failed": "timeout"})], [1.0]))
    assert metrics["val/failed"] == 1
    assert scores(metrics) == {"org/set": 0.5}


def answered(*pairs: tuple[Any, float]) -> list[Scored]:
    return [Scored(score, info={} if answer is None else {"pred": answer}) for answer, score in pairs]


@pytest.mark.parametrize(
    ("pairs", "score"),
    [
        ([("72", 1.0), ("7", 0.0), ("72", 1.0)], 1.0),
        ([("7", 0.0), ("72", 1.0), ("7", 0.0)], 0.0),
        ([("72", 1.0), ("7", 0.0)], 1.0),  # ties go to the first
        ([("7", 0.0), ("72", 1.0)], 0.0),
        ([("7", 0.0), ("72", 1.0), ("72", 1.0), ("7", 0.0)], 0.0),
        ([(None, 0.0), (None, 0.0), ("72", 1.0)], 1.0),  # what is no answer has no vote
        ([("", 0.0), (" ", 0.0), (" 72 ", 1.0)], 1.0),
        ([(None, 0.25), (None, 0.75)], 0.5),  # unless there is no answer at all
        ([("72", 1.0), ("72", 0.9), ("7", 0.0)], 0.95),  # one answer, written in two forms
        ([(["a"], 1.0), (["a"], 1.0), ({"b": 1}, 0.0)], 1.0),
    ],
)
def test_the_majority_decides(pairs: list[tuple[Any, float]], score: float) -> None:
    assert majority(answered(*pairs)) == pytest.approx(score)


def test_a_majority_is_told_where_answers_are(samples) -> None:
    metrics = scores(
        validation_metrics(samples(answered(("1", 1.0), ("2", 0.0), ("1", 1.0)), answered((None, 0.0)) * 3))
    )
    assert metrics["org/set/maj@3"] == 0.5
    number = [Scored(0.0, components={"pred": 3.0}), Scored(1.0, components={"pred": 4.0})]
    assert scores(validation_metrics(samples(number)))["org/set/maj@2"] == 0.0
    assert "org/set/maj@2" not in scores(validation_metrics(samples([1.0, 0.0])))


SCORES = st.lists(st.floats(-10, 10), min_size=1, max_size=9)


@given(SCORES)
def test_best_lies_between_mean_and_maximum_and_grows_with_k(values: list[float]) -> None:
    best = [best_of(values, k) for k in range(1, len(values) + 3)]
    assert best[0] == pytest.approx(sum(values) / len(values), abs=1e-9)
    assert best[len(values) - 1 :] == [max(values)] * 3
    assert all(b >= a - 1e-9 for a, b in pairwise(best))


@given(SCORES, st.integers(1, 9), st.randoms(use_true_random=False))
def test_best_is_the_mean_over_all_draws(values: list[float], k: int, random) -> None:
    k = min(k, len(values))
    draws = [max(draw) for draw in combinations(values, k)]
    assert best_of(values, k) == pytest.approx(math.fsum(draws) / len(draws), abs=1e-9)
    shuffled = random.sample(values, len(values))
    assert best_of(shuffled, k) == best_of(values, k)


def test_best_of_many_is_exact() -> None:
    # One right answer among 4096: it is in a draw of 1024 with probability 1/4.
    assert best_of([0.0] * 4095 + [1.0], 1024) == pytest.approx(0.25, rel=1e-12)


@given(st.lists(st.tuples(st.sampled_from([None, "1", "2"]), st.floats(0, 1)), min_size=1, max_size=8))
def test_the_majority_lies_between_worst_and_best(pairs: list[tuple[Any, float]]) -> None:
    values = [score for _, score in pairs]
    assert min(values) - 1e-9 <= majority(answered(*pairs)) <= max(values) + 1e-9
