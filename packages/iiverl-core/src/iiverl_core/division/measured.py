"""Times of the steps of a run that was measured, and the lengths of its responses."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from iiverl_core.config import RunConfig
from iiverl_core.division.costs import Costs
from iiverl_core.division.lengths import Lengths
from iiverl_core.division.simulation import STEPS, generation_seconds
from iiverl_core.errors import ConfigError
from iiverl_core.telemetry.history import is_finite_number, read_history

MIN_STEPS = 3
"""Fewer steps, without the first, say nothing."""
NEITHER = ("timing_s/update_weights", "timing_s/testing", "timing_s/save_checkpoint")
"""Parts of a step in which nothing is generated or trained."""


@dataclass(frozen=True)
class Measured:
    """Medians of a run's `steps`, in seconds: generating a step's responses, training on them, the transfer of weights."""

    steps: int
    generating: float
    training: float
    transfer: float
    lengths: Lengths


def measure(run: RunConfig, folder: Path) -> Measured:
    """Read what a run with this configuration measured, from its folder. Its first step is left out.

    Raises:
        ConfigError: it has too few steps, or times of which nothing can be concluded.
    """
    history = [record for record in read_history(folder) if record["step"] > 0][1:]
    if len(history) < MIN_STEPS:
        raise ConfigError(
            f"{folder}: metrics.jsonl has {len(history)} steps after the first, and {MIN_STEPS} are needed to divide devices by "
            "their times; name another run with --run"
        )
    if run.interrupts_rollouts:
        raise ConfigError(
            f"{folder}: with rollout.partial, responses of several steps are written side by side, and the time of one step's "
            "cannot be told; name a run without it with --run"
        )

    def middle(name: str) -> float:
        found = [float(record[name]) for record in history if is_finite_number(record.get(name))]
        return median(found) if found else 0.0

    training = median(_training(record) for record in history)
    generating = middle("timing_s/gen")
    if training <= 0 or generating <= 0:
        raise ConfigError(
            f"{folder}: metrics.jsonl has no times of generating or training; name another run with --run"
        )
    lengths = Lengths.fitted(
        middle("response_length/mean"),
        middle("response_length/max"),
        responses_of(run),
        limit=run.data.max_response_length,
        prompt=middle("prompt_length/mean"),
        group=run.rollout.n,
    )
    return Measured(len(history), generating, training, middle("timing_s/update_weights"), lengths)


def responses_of(run: RunConfig) -> int:
    """Count the responses of a step."""
    return run.data.train_batch_size * run.rollout.n


def calibrate(costs: Costs, measured: Measured, responses: int, *, training: int, engines: int) -> Costs:
    """Scale costs so that a step of the run that was measured, on so many devices and engines, takes as long as it did."""
    factor = measured.generating / generation_seconds(costs, measured.lengths, responses, engines)
    drawn = fmean(float(measured.lengths.draw(step, responses).sum()) for step in range(1, STEPS + 1))
    tokens = drawn + measured.lengths.prompt_tokens(responses)
    return replace(
        costs.with_engines_slower(factor),
        trained=measured.training * training / tokens,
        transfer=measured.transfer,
    )


def _training(record: Mapping[str, Any]) -> float:
    """Return the seconds of a step that are not spent on waiting for rollouts, weights, validation and checkpoints."""

    def seconds(*names: str) -> float:
        return sum(float(record[name]) for name in names if is_finite_number(record.get(name)))

    beside = "timing_s/wait_rollouts" in record
    waiting = ("timing_s/wait_rollouts",) if beside else ("timing_s/gen", "timing_s/reward")
    return seconds("timing_s/step") - seconds(*waiting, *NEITHER)
