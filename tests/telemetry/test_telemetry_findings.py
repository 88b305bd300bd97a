"""What a run's metrics say about what goes wrong: each finding on the run that shows it, and silence on a good one."""

from collections.abc import Callable
from typing import Any

import pytest

from iiverl_core.registry.metrics import describe
from iiverl_core.telemetry.findings import MIN_STEPS, find_problems

STEPS = 60
Curve = Callable[[float], float]


def history(steps: int = STEPS, **curves: float | Curve) -> list[dict[str, Any]]:
    """A run that learns from 0 to 1; `curves` are values, or functions of the part of the run that is over."""
    usual: dict[str, float | Curve] = {
        "critic/score/mean": lambda part: part,
        "critic/advantages/max": 1.0,
        "critic/advantages/min": -1.0,
        "response_length/clip_ratio": 0.05,
        "actor/entropy_loss": lambda part: 2.0 - 1.9 * part,
        "actor/ppo_kl": 0.001,
        "critic/kl": lambda part: 0.02 * part,
        "rollout/kl": 1e-4,
        "reward/failed": 0.0,
        "actor/skipped_updates": 0.0,
        "response/duplicates": 0.2,
        "critic/score/length_correlation": 0.3,
        "response_length/mean": lambda part: 100 * (1 + part),
        "timing_s/step": 10.0,
        "timing_s/wait_rollouts": 1.0,
        "timing_s/engines_wait": 1.0,
        "perf/engines": 4.0,
    }
    usual |= {name.replace("__", "/"): curve for name, curve in curves.items()}
    return [
        {"step": 0, "val/failed": 0.0},
        *(
            {"step": i + 1}
            | {name: curve(i / (steps - 1)) if callable(curve) else curve for name, curve in usual.items()}
            for i in range(steps)
        ),
    ]


FAULTS: list[tuple[str, str, dict[str, float | Curve]]] = [
    (
        "critic/advantages/max",
        "score the same",
        {"critic__advantages__max": 0.0, "critic__advantages__min": 0.0},
    ),
    ("response_length/clip_ratio", "90%", {"response_length__clip_ratio": 0.9}),
    (
        "actor/entropy_loss",
        "has fallen",
        {
            "actor__entropy_loss": lambda part: 2.0 if part < 0.5 else 0.05,
            "critic__score__mean": lambda part: 0.8 if 0.3 < part < 0.5 else 0.1,
        },
    ),
    (
        "actor/entropy_loss",
        "has grown",
        {
            "actor__entropy_loss": lambda part: 0.5 + 6 * part,
            "critic__score__mean": lambda part: max(0.0, 0.9 - 2 * part),
        },
    ),
    ("critic/kl", "has grown from", {"critic__kl": lambda part: 0.02 if part < 0.7 else 5.0}),
    ("actor/ppo_kl", "within a step", {"actor__ppo_kl": 0.4}),
    ("rollout/kl", "engine's probabilities", {"rollout__kl": 0.05}),
    (
        "response/duplicates",
        "90% of the responses",
        {
            "response__duplicates": 0.9,
            "actor__entropy_loss": 1.0,
            "critic__score__mean": lambda part: 0.8 if 0.3 < part < 0.5 else 0.1,
        },
    ),
    ("critic/score/length_correlation", "from 104 to 196", {"critic__score__length_correlation": 0.8}),
    ("timing_s/wait_rollouts", "40% of the time", {"timing_s__wait_rollouts": 4.0}),
    ("timing_s/engines_wait", "30% of the time", {"timing_s__engines_wait": 3.0}),
    ("perf/engines", "Of 4 engines, 1", {"perf__engines": lambda part: 4.0 if part < 0.3 else 3.0}),
    ("reward/failed", "120 responses of 60 steps", {"reward__failed": 2.0}),
    ("actor/skipped_updates", "60 of 60", {"actor__skipped_updates": 0.5}),
]


@pytest.mark.parametrize(("metric", "part", "curves"), FAULTS)
def test_each_fault_is_found_alone(metric: str, part: str, curves: dict[str, float | Curve]) -> None:
    (finding,) = find_problems(history(**curves))
    assert finding.metric == metric and part in finding.text and finding.advice
    assert describe(metric) is not None


def test_a_run_that_learns_is_not_blamed() -> None:
    assert find_problems(history()) == []


def test_a_policy_that_is_sure_of_what_it_has_learned_is_not_blamed() -> None:
    assert find_problems(history(actor__entropy_loss=lambda part: 3.0 * (1 - part) + 0.01)) == []
    assert find_problems(history(response__duplicates=lambda part: part)) == []


def test_a_few_steps_say_nothing() -> None:
    assert find_problems(history(MIN_STEPS - 1, rollout__kl=1.0)) == []
    assert find_problems([]) == []


def test_values_that_are_not_finite_or_missing_are_left_out() -> None:
    records = history(rollout__kl=0.05)
    for record in records[::2]:
        record["rollout/kl"] = None
        record.pop("actor/ppo_kl", None)
    assert [finding.metric for finding in find_problems(records)] == ["rollout/kl"]
