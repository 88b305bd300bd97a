"""Benchmarks that need no GPU and no other system run, in their smallest form."""

from pathlib import Path

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
