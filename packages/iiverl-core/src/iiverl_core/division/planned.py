"""The division of the devices of a run, from its configuration and, if there are any, its measured steps."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from iiverl_core.config import ROLLOUT, Role, RunConfig
from iiverl_core.config.model_facts import ModelFacts
from iiverl_core.division.choice import MODES, Division, best_division
from iiverl_core.division.costs import (
    BF16,
    FORWARD,
    UPDATE,
    ModelSize,
    estimate_costs,
)
from iiverl_core.division.lengths import Lengths
from iiverl_core.division.measured import Measured, calibrate, measure, responses_of
from iiverl_core.division.simulation import simulate
from iiverl_core.errors import ConfigError

STEPS = 8  # of the simulation


@dataclass(frozen=True)
class DivisionPlan:
    """The best division of `devices` for each mode that is possible, and the steps by whose times; None if these are estimated.

    `current` is that of the run, if it has as many devices and divides them.
    """

    devices: int
    measured: Measured | None
    lengths: Lengths
    divisions: tuple[Division, ...]
    current: Division | None

    @property
    def in_turn(self) -> Division | None:
        """All devices generating and training in turn, if so many can."""
        return next((each for each in self.divisions if not each.max_staleness), None)


def plan_division(
    run: RunConfig,
    facts: Mapping[Role, ModelFacts],
    device: str,
    *,
    devices: int | None = None,
    folder: Path | None = None,
) -> DivisionPlan:
    """Find how to divide the run's devices, or so many, between training and generating.

    Times are those that the run in `folder` measured, which has this configuration, or estimated for `device`, such as
    H100. Then responses have a quarter of `data.max_response_length` on average, and a long tail.

    Raises:
        ConfigError: the devices cannot be divided, the device is not known, or the folder's run is of no use for it.
    """
    generating = run.trainer.rollout_devices or run.devices
    total = devices or run.devices + (run.trainer.rollout_devices or 0)
    training_unit = run.devices // run.actor.data_ranks
    responses = responses_of(run)
    costs = estimate_costs(
        _size(facts["actor"]),
        device,
        engine_devices=run.engine_devices,
        flops_per_weight=_flops(run, facts),
    )
    if costs is None:
        raise ConfigError(f"--device: nothing is known of {device}; name one such as A100, H100 or H200")
    lengths = Lengths.assumed(run.data.max_response_length, run.data.max_prompt_length / 2, run.rollout.n)
    measured = None
    if folder is not None:
        measured = measure(run, folder)
        lengths = measured.lengths
        engines = generating // run.engine_devices
        costs = calibrate(costs, measured, responses, training=run.devices, engines=engines)
    found = [
        best_division(
            costs,
            lengths,
            responses,
            total,
            k=k,
            partial=partial,
            engine_devices=run.engine_devices,
            training_unit=training_unit,
            steps=STEPS,
        )
        for k, partial in MODES
    ]
    divisions = tuple(each for each in found if each is not None)
    if not divisions:
        raise ConfigError(
            f"{total} devices cannot be divided: an engine has {run.engine_devices} "
            f"({ROLLOUT}.tensor_model_parallel_size), and a copy of the model that trains has {training_unit}"
        )
    current = None
    if run.trainer.rollout_devices and run.trainer.max_staleness and total == run.devices + generating:
        partial, k = run.interrupts_rollouts, run.trainer.max_staleness
        times = simulate(
            costs,
            lengths,
            responses,
            training=run.devices,
            engines=generating // run.engine_devices,
            k=k,
            partial=partial,
            steps=STEPS,
        )
        current = Division(k, partial, run.devices, generating, times)
    return DivisionPlan(total, measured, lengths, divisions, current)


def _size(facts: ModelFacts) -> ModelSize:
    cache = 2 * facts.layers * facts.kv_size * BF16
    return ModelSize(facts.parameters, facts.active_parameters, cache)


def _flops(run: RunConfig, facts: Mapping[Role, ModelFacts]) -> float:
    """Count the FLOPs of all models per token and active parameter of the actor."""
    actor = facts["actor"].active_parameters
    total = 0.0
    for name, role in run.roles.items():
        trained = role.training.epochs * UPDATE if role.training else 0
        forward = 0 if name == "actor" else FORWARD
        total += (trained + forward) * facts[name].active_parameters / actor
    return total
