"""How devices are divided between training and generating: by times that are measured or estimated."""

import json
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iiverl_core.config import RunConfig, build, run_config
from iiverl_core.division import (
    Costs,
    Lengths,
    ModelSize,
    best_division,
    calibrate,
    estimate_costs,
    generation_seconds,
    measure,
    simulate,
)
from iiverl_core.errors import ConfigError

SIZE = ModelSize(7.6e9, 7.6e9, 57344)
LENGTHS = Lengths.assumed(4096, 512, 16)
RESPONSES = 512


def h200() -> Costs:
    costs = estimate_costs(SIZE, "NVIDIA H200")
    assert costs is not None
    return costs


def run(**trainer: Any) -> RunConfig:
    return run_config(
        build(
            {
                "data": {"train_batch_size": 8, "max_response_length": 256},
                "actor_rollout_ref": {"rollout": {"name": "hf", "n": 4}},
                "trainer": {"n_gpus_per_node": 2, "rollout_devices": 2, **trainer},
            }
        )
    )


def test_equal_lengths_take_what_can_be_counted_by_hand() -> None:
    """100 tokens of 4 responses on each of 2 engines; training takes a second in all."""
    costs = Costs(read=0.01, cached=0.0, computed=0.0, trained=1 / 800, transfer=0.0)
    same = Lengths(100, 0.0, 100, 0, 4)
    numbers: dict[str, Any] = {"responses": 8, "engines": 2, "steps": 20}
    in_turn = simulate(costs, same, training=1, k=0, partial=False, **numbers)
    beside = simulate(costs, same, training=1, k=1, partial=False, **numbers)
    assert in_turn.step == pytest.approx(2.0) and in_turn.generating_idle == pytest.approx(0.0)
    assert beside.step == pytest.approx(1.0)
    assert beside.training_idle == pytest.approx(0.0) and beside.generating_idle == pytest.approx(0.0)
    slower = simulate(costs.with_engines_slower(2), same, training=1, k=1, partial=False, **numbers)
    assert slower.step == pytest.approx(2.0)
    assert slower.training_idle == pytest.approx(0.5) and slower.generating_idle == pytest.approx(0.0)


@pytest.mark.parametrize(("k", "partial"), [(1, False), (2, True), (4, True)])
def test_the_slower_engines_are_the_more_devices_generate(k: int, partial: bool) -> None:
    found = [
        best_division(
            h200().with_engines_slower(factor), LENGTHS, RESPONSES, 16, k=k, partial=partial, steps=8
        )
        for factor in (0.25, 1, 4, 16)
    ]
    generating = [each.generating for each in found if each]
    assert generating == sorted(generating) and generating[0] < generating[-1]
    steps = [each.times.step for each in found if each]
    assert steps == sorted(steps)


@given(st.integers(2, 12), st.sampled_from([1, 2]), st.sampled_from([1, 2, 3]), st.floats(0.1, 10))
@settings(max_examples=25, deadline=None)
def test_no_division_of_a_few_devices_is_better(devices: int, engine: int, unit: int, factor: float) -> None:
    costs, numbers = h200().with_engines_slower(factor), {"k": 1, "partial": False, "steps": 4}
    best = best_division(costs, LENGTHS, 128, devices, engine_devices=engine, training_unit=unit, **numbers)
    steps = {
        generating: simulate(
            costs, LENGTHS, 128, training=devices - generating, engines=generating // engine, **numbers
        ).step
        for generating in range(engine, devices, engine)
        if (devices - generating) % unit == 0
    }
    assert (best is None) == (not steps)
    if best:
        assert best.training + best.generating == devices
        assert best.times.step == pytest.approx(min(steps.values()), rel=0.02)


def test_long_tails_gain_by_partial_rollouts() -> None:
    """With the same devices: a step waits for its longest responses, unless others are written meanwhile."""
    step = {
        (k, partial): simulate(h200(), LENGTHS, RESPONSES, training=8, engines=8, k=k, partial=partial).step
        for k, partial in ((0, False), (1, False), (2, True), (4, True))
    }
    assert step[4, True] < step[2, True] < 0.8 * step[1, False]


@given(st.floats(5, 100), st.floats(0.05, 1.2))
@settings(max_examples=20, deadline=None)
def test_lengths_have_the_mean_and_the_longest_that_were_measured(mean: float, sigma: float) -> None:
    true = Lengths(mean, sigma, 10**6, 0, 4)
    drawn = [np.random.default_rng(i).lognormal(np.log(mean) - sigma**2 / 2, sigma, 256) for i in range(99)]
    fitted = Lengths.fitted(
        float(np.mean(drawn)),
        median(float(each.max()) for each in drawn),
        256,
        limit=10**6,
        prompt=0,
        group=4,
    )
    assert fitted.mean == pytest.approx(true.mean, rel=0.1)
    assert fitted.sigma == pytest.approx(true.sigma, rel=0.25)


def write_metrics(folder: Path, steps: int, **changed: float) -> None:
    usual = {
        "timing_s/step": 10.0,
        "timing_s/gen": 6.0,
        "timing_s/reward": 1.0,
        "timing_s/update_weights": 0.5,
        "response_length/mean": 100.0,
        "response_length/max": 200.0,
        "prompt_length/mean": 20.0,
    }
    first = {name: 100 * value for name, value in usual.items()}  # which warms up
    rows = [first, *([usual | {name.replace("__", "/"): value for name, value in changed.items()}] * steps)]
    lines = [json.dumps({"step": i, **row}) for i, row in enumerate(rows, 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def test_the_run_that_was_measured_is_what_is_simulated(tmp_path: Path) -> None:
    write_metrics(tmp_path, 5)
    found = measure(run(), tmp_path)
    assert (found.steps, found.generating, found.training, found.transfer) == (5, 6.0, 2.5, 0.5)
    costs = calibrate(h200(), found, 32, training=2, engines=2)
    assert generation_seconds(costs, found.lengths, 32, 2) == pytest.approx(6.0)
    times = simulate(costs, found.lengths, 32, training=2, engines=2, k=0, partial=False)
    assert times.step == pytest.approx(6.0 + 2.5 + 0.5, rel=0.1)
    write_metrics(
        tmp_path, 5, timing_s__wait_rollouts=3.0
    )  # beside training, in which `gen` and `reward` take no time
    assert measure(run(max_staleness=1), tmp_path).training == 6.5


def test_runs_that_say_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"0 steps after the first, and 3 are needed.*--run"):
        measure(run(), tmp_path)
    write_metrics(tmp_path, 5, timing_s__gen=0.0)
    with pytest.raises(ConfigError, match="no times of generating"):
        measure(run(), tmp_path)
    interrupted = build(
        {
            "actor_rollout_ref": {"rollout": {"name": "hf", "partial": True}},
            "trainer": {"n_gpus_per_node": 2, "rollout_devices": 2, "max_staleness": 2},
        }
    )
    with pytest.raises(ConfigError, match=r"rollout\.partial.*cannot be told"):
        measure(run_config(interrupted), tmp_path)


def test_unknown_devices_have_no_estimate() -> None:
    assert estimate_costs(SIZE, "abacus") is None
    fast, slow = (estimate_costs(SIZE, name) for name in ("NVIDIA H200", "NVIDIA A100-SXM4-80GB"))
    assert fast and slow and fast.read < slow.read and fast.trained < slow.trained
    assert fmean([fast.decode(1, 0), fast.decode(10**6, 0)]) > fast.read
