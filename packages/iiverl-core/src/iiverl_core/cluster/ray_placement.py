"""Devices that are reserved for processes under Ray, and the machines that have them."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from iiverl_core import activity
from iiverl_core.errors import ConfigError

PLACEMENT_TIMEOUT_S = 60  # for resources of a shared cluster to come free, by default
REPORT_S = 15  # between lines about a placement that is waited for
Machines: TypeAlias = tuple[str, ...]
"""Ray's names of some machines. One that comes back has another name."""


def reserve(
    bundles: Sequence[int], device: str, *, strategy: str, timeout_s: float, log: Callable[[str], None]
) -> PlacementGroup:
    """Reserve bundles of devices, each on one machine; `log` gets a line every `REPORT_S` seconds of waiting.

    A cluster that scales adds machines for what is waiting.

    Raises:
        ConfigError: they do not come free in time.
    """
    wanted = [{"CPU": float(n)} | ({"GPU": float(n)} if device == "cuda" else {}) for n in bundles]
    group = placement_group(wanted, strategy=strategy)
    began = time.monotonic()
    try:
        while not group.wait(min(REPORT_S, max(began + timeout_s - time.monotonic(), 0.0))):
            waited = time.monotonic() - began
            free = _devices(ray.available_resources())
            if waited >= timeout_s:
                raise ConfigError(
                    f"the Ray cluster could not place {len(wanted)} × {wanted[0]} within {timeout_s:g} s; free now: "
                    f"{free}. Wait for other jobs, ask for less in trainer.nnodes, trainer.n_gpus_per_node and "
                    "trainer.rollout_devices, or raise trainer.placement_timeout if the cluster is still adding machines"
                )
            activity.advance()
            log(
                f"waiting for the Ray cluster to place {len(wanted)} × {wanted[0]}, {waited:.0f} of {timeout_s:g} s; it has "
                f"{_devices(ray.cluster_resources())}, free are {free}"
            )
    except BaseException:
        remove_placement_group(group)
        raise
    return group


def find_machines(group: PlacementGroup, bundles: Iterable[Sequence[int]]) -> list[Machines | None]:
    """Find the machines of each sequence of bundles; None if one of them is gone, and Ray has found no other yet."""
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    placed = placement_group_table(group)["bundles_to_node_id"]
    machines = [tuple(placed.get(bundle, "") for bundle in dict.fromkeys(each)) for each in bundles]
    return [each if alive.issuperset(each) else None for each in machines]


def _devices(resources: Mapping[str, float]) -> dict[str, float]:
    return {name: amount for name, amount in resources.items() if name in ("CPU", "GPU")}
