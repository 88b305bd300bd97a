"""Benchmarks that need no GPU and no other system run, in their smallest form."""

import json
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


def test_measured_engines_take_the_time_that_was_measured(tmp_path: Path) -> None:
    """Figures of models of two sizes give the bandwidth and the overhead of a step, and no model is faster than both."""
    import async_scale

    usual = {"MFU %": 30.0, "log-prob tokens/s": 1e5, "weight update s": 0.5}
    parts = [
        {"part": part, "size": size, "state": "ok", "numbers": {**usual, "generated tokens/s": speed}}
        for size, speed in (("0.5b", 40_000.0), ("1.5b", 25_000.0))
        for part in ("train packed", "rollout vllm")
    ]
    file = tmp_path / "check.json"
    file.write_text(json.dumps({"machine": {"device": "NVIDIA H200"}, "parts": parts}))
    assumed = async_scale.assumed("NVIDIA H200", 0.4, 0.6)
    figures = async_scale.measured(file, assumed)
    assert figures.mfu == 0.3 and 0 < figures.bandwidth_share < 1
    for size, speed in (("0.5b", 40_000.0), ("1.5b", 25_000.0)):
        model = async_scale._size(async_scale._facts(size))
        costs = figures.costs(model)
        assert costs.decode(256, 256 * (192 + 128)) == pytest.approx(256 / speed, rel=1e-6)
    assert figures.costs(model).transfer == pytest.approx(0.5)
    parts[1]["state"] = parts[3]["state"] = "failed"
    file.write_text(json.dumps({"machine": {"device": "NVIDIA H200"}, "parts": parts}))
    assert async_scale.measured(file, assumed).bandwidth_share == 0.6
    rows = async_scale.simulated(async_scale.measured(file, assumed).costs(model), 8, 512, 4)
    assert rows[-1]["gain"] > rows[0]["gain"] == 1
