"""What holds for every run that these tests make."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from iiverl_core.registry.metrics import describe


@pytest.fixture(autouse=True)
def every_metric_is_in_the_registry(tmp_path: Path) -> Iterator[None]:
    """Look at all metrics that the runs of a test have logged."""
    yield
    lines = [line for file in tmp_path.rglob("metrics.jsonl") for line in file.read_text().splitlines()]
    logged = {name for line in lines if line.endswith("}") for name in json.loads(line)}
    assert {name for name in logged - {"step", "time"} if describe(name) is None} == set()
