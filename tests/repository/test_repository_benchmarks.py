"""Benchmarks that need no GPU and no other system run, in their smallest form."""

from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def from_their_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_the_controller_is_measured_over_made_up_workers() -> None:
    import controller_scale

    row = controller_scale.measure(samples=64, devices=2)
    assert row["calls"] > 0 and 0 < row["sent_bytes_per_sample"] < 5000
    assert controller_scale.problems([row, row]) == []


@pytest.mark.parametrize(("staleness", "partial"), [(0, False), (2, False), (2, True)])
def test_the_loop_runs_beside_an_engine_that_sleeps(staleness: int, partial: bool) -> None:
    import async_overlap

    assert async_overlap.measure(staleness, lambda id: 3, 1e-4, 0.0, steps=5, partial=partial) > 0


def test_the_simulated_engines_write_every_token() -> None:
    import async_scale

    machine = async_scale.Machine(parameters=7.6e9, mfu=0.4, bandwidth_share=0.6)
    engine = async_scale.Engine(machine)
    engine.add(1, np.array([3.0, 5.0]))
    engine.add(2, np.array([9.0]))
    engine.finish(1)
    assert engine.left.tolist() == [4.0] and engine.written.tolist() == [5.0]
    in_turn = async_scale.step_seconds(machine, 8, 512, 6, 0, False, 1.0)
    assert 0 < async_scale.step_seconds(machine, 8, 512, 6, 2, True, 0.5) < in_turn
