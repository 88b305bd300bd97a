"""Merge the metrics of the parts of a batch: most are sums, and those named `…/max` are maxima."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

Value = TypeVar("Value", float, "Tensor")


def merge(total: dict[str, Value], part: Mapping[str, Value]) -> None:
    """Merge the metrics of another part (a micro-batch, a process) into `total`."""
    for name, value in part.items():
        if name not in total:
            total[name] = value
        elif not name.endswith("/max"):
            total[name] = total[name] + value
        else:
            total[name] = _larger(total[name], value)


def _larger(one: Value, other: Value) -> Value:
    if isinstance(one, float | int) or isinstance(other, float | int):
        return max(one, other)
    return one.maximum(other)  # does not synchronize with a GPU


def over_updates(updates: list[Mapping[str, float]]) -> dict[str, float]:
    """Summarize several updates: the mean of each metric over those that have it, or the maximum of those named `…/max`."""
    by_name: dict[str, list[float]] = {}
    for update in updates:
        for name, value in update.items():
            by_name.setdefault(name, []).append(value)
    return {
        name: max(values) if name.endswith("/max") else sum(values) / len(values)
        for name, values in by_name.items()
    }
