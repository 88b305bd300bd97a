"""The division of devices with the shortest step."""

from dataclasses import dataclass

from iiverl_core.division.costs import Costs
from iiverl_core.division.lengths import Lengths
from iiverl_core.division.simulation import STEPS, Times, simulate

MODES: tuple[tuple[int, bool], ...] = ((0, False), (1, False), (2, True), (4, True))
"""Values of `trainer.max_staleness`, without and with `rollout.partial`, that are worth comparing."""
TRIED = 7  # divisions at a time; the range around the best of them is divided again


@dataclass(frozen=True)
class Division:
    """Devices that train and those that generate, all of them both in turn if `max_staleness` is 0, and a step's times."""

    max_staleness: int
    partial: bool
    training: int
    generating: int
    times: Times


def best_division(
    costs: Costs,
    lengths: Lengths,
    responses: int,
    devices: int,
    *,
    k: int,
    partial: bool,
    engine_devices: int = 1,
    training_unit: int = 1,
    steps: int = STEPS,
) -> Division | None:
    """Find the division of `devices` with the shortest simulated step; None if there is none.

    Engines are spread over `engine_devices` each, and devices that train are a multiple of `training_unit`. Among many
    divisions, those around the best of a few are tried.
    """

    def timed(generating: int) -> Division:
        training = devices - generating if k else devices
        times = simulate(
            costs,
            lengths,
            responses,
            training=training,
            engines=generating // engine_devices,
            k=k,
            partial=partial,
            steps=steps,
        )
        return Division(k, partial, training, generating, times)

    if k == 0:
        return None if devices % engine_devices or devices % training_unit else timed(devices)
    possible = [
        generating
        for generating in range(engine_devices, devices, engine_devices)
        if (devices - generating) % training_unit == 0
    ]
    tried: dict[int, Division] = {}
    best = 0
    while possible:
        spread = {possible[round(i * (len(possible) - 1) / (TRIED - 1))] for i in range(TRIED)}
        tried |= {generating: timed(generating) for generating in sorted(spread - tried.keys())}
        best = min(tried, key=lambda generating: (tried[generating].times.step, generating))
        below = max((each for each in tried if each < best), default=best)
        above = min((each for each in tried if each > best), default=best)
        possible = [each for each in possible if below < each < above and each not in tried]
    return tried.get(best)
