"""The charts of a report: which metrics they show, and their values in a form that stays small for long runs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from iiverl_core.registry.metrics import describe
from iiverl_core.telemetry.history import is_finite_number

MAX_POINTS = 1000
"""Steps of a curve that are shown; of longer runs every second one, third one, and so on."""


@dataclass(frozen=True)
class Chart:
    """A chart of metrics, named by their names or by patterns that end in `*`.

    `band` are the metrics of a lower and an upper bound around the first line. `stacked` areas add up.
    """

    title: str
    metrics: tuple[str, ...]
    band: tuple[str, str] | None = None
    kind: Literal["lines", "stacked"] = "lines"


_SUMS = ("timing_s/step",)  # of the areas beside them
_WAIT, _ENGINES_WAIT = "timing_s/wait_rollouts", "timing_s/engines_wait"
_BESIDE = ("timing_s/gen", "timing_s/reward", _ENGINES_WAIT)  # with `_WAIT`, they are not parts of the step

CHARTS = (
    Chart("Reward", ("critic/score/mean",), ("critic/score/min", "critic/score/max")),
    Chart("Validation score", ("val/test_score/*",)),
    Chart("Components of the score", ("reward/*/mean",)),
    Chart("Response length", ("response_length/mean",), ("response_length/min", "response_length/max")),
    Chart("Responses cut off", ("response_length/clip_ratio", "val/response_length/clip_ratio")),
    Chart("Entropy", ("actor/entropy_loss",)),
    Chart("KL divergence", ("actor/ppo_kl", "critic/kl", "actor/kl_loss")),
    Chart("Clipped tokens", ("actor/pg_clipfrac", "actor/pg_clipfrac_lower")),
    Chart("Mismatch of engine and trainer", ("rollout/kl",)),
    Chart("Gradient norm", ("actor/grad_norm", "critic/grad_norm")),
    Chart("Learning rate", ("actor/lr", "critic/lr")),
    Chart("Value function", ("critic/vf_loss", "critic/vf_explained_var")),
    Chart("Failed samples", ("reward/failed/*",)),
    Chart("Turns and tool calls", ("rollout/turns", "rollout/tool_calls", "rollout/tool_errors")),
    Chart("Staleness", ("staleness/mean", "staleness/max", "perf/rollouts_ready")),
    Chart("Waiting of trainer and engines", (_WAIT, _ENGINES_WAIT)),
    Chart("Time of a step", ("timing_s/*",), kind="stacked"),
    Chart("Throughput", ("perf/throughput",)),
    Chart(
        "Memory", ("perf/max_memory_allocated_gb", "perf/max_memory_reserved_gb", "perf/cpu_memory_used_gb")
    ),
)


def shown_charts(names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the charts that have at least one of these metrics, with the names of theirs."""
    charts: list[dict[str, Any]] = []
    for chart in CHARTS:
        metrics = list(dict.fromkeys(name for each in chart.metrics for name in _matching(each, names)))
        if metrics:
            band = chart.band if chart.band and set(chart.band) <= set(names) else None
            charts.append({"title": chart.title, "metrics": metrics, "band": band, "kind": chart.kind})
    return charts


def meanings(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Return the unit and the meaning of each metric that is known."""
    known = {name: describe(name) for name in names}
    return {name: (metric.unit, metric.summary) for name, metric in known.items() if metric is not None}


def curves(history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the steps of a run and the values of each metric there; None where a step has no finite value.

    Of more than `MAX_POINTS` steps, every k-th is kept, and the last one.
    """
    stride = math.ceil(len(history) / MAX_POINTS) or 1
    kept = [record for i, record in enumerate(history) if i % stride == 0 or i == len(history) - 1]
    names = sorted({name for record in history for name in record} - {"step", "time"})
    values = {
        name: [_short(record[name]) if is_finite_number(record.get(name)) else None for record in kept]
        for name in names
    }
    some = {name: each for name, each in values.items() if any(value is not None for value in each)}
    return {"steps": [record["step"] for record in kept], "stride": stride, "values": some}


def _matching(pattern: str, names: Sequence[str]) -> list[str]:
    before, star, after = pattern.partition("*")
    if not star:
        return [pattern] if pattern in names else []
    left_out = (*_SUMS, *_BESIDE) if _WAIT in names else _SUMS
    return [
        name for name in names if name.startswith(before) and name.endswith(after) and name not in left_out
    ]


def _short(value: float) -> float:
    return float(f"{value:.6g}")
