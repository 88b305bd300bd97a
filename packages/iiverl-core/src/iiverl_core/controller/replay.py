"""Compute steps of a run again from a checkpoint and the recorded rollouts, without an engine.

Everything but the rollouts is a function of the configuration, the checkpoint and the step, so that the loop computes the
same bits as in the run; with another configuration, what that would have changed.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from iiverl_core.checkpoints import (
    CONFIG_FILE,
    DATASET_FILE,
    VERSIONS_FILE,
    Checkpoint,
    checkpoints,
    compare_config,
    forbidden,
    read_json,
    to_json,
    verify,
    versions,
)
from iiverl_core.config import Loaded, RunConfig
from iiverl_core.config.recorded import load_recorded
from iiverl_core.controller.collector import StepData
from iiverl_core.controller.observer import Observer
from iiverl_core.controller.recorded_rollouts import RecordedRollouts, recorded_steps
from iiverl_core.controller.resume import Start, compare_run, initial_state, read_state
from iiverl_core.controller.run_diff import CLOCKS
from iiverl_core.controller.starting import start_ray, started
from iiverl_core.controller.step_recorder import NONFINITE
from iiverl_core.controller.train import make_plan
from iiverl_core.controller.watchdog import Watchdog
from iiverl_core.controller.worker_client import WorkerClient
from iiverl_core.data import write_tokenizer
from iiverl_core.errors import CheckpointError, IIVerlError, join_names
from iiverl_core.stopping import Stop
from iiverl_core.telemetry import Progress, Tracker, make_trackers, read_history, samples_folder
from iiverl_core.telemetry.generations import Generation
from iiverl_core.telemetry.run_record import SAMPLES_FOLDER
from iiverl_core.telemetry.trackers import Trackers

VALIDATION = "val/"
"""First part of the names of validation metrics."""


class ReplayError(IIVerlError):
    """A step cannot be computed again."""

    exit_code = 2

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class ReplayedStep:
    """A step that was computed again: its metrics in the run, None if it has none of this step, and those of now.

    Times, memory and validations are left out; a metric that is not finite is None.
    """

    step: int
    recorded: Mapping[str, float | None] | None
    replayed: Mapping[str, float | None]

    @property
    def different(self) -> list[str]:
        """The metrics that are not equal to the last bit, or that only one has."""
        before = self.recorded or {}
        names = sorted(before.keys() | self.replayed.keys())
        return [name for name in names if before.get(name, math.nan) != self.replayed.get(name, math.nan)]


def load_run(folder: Path, overrides: Iterable[str] = (), output: Path | None = None) -> Loaded:
    """Load the configuration that a run recorded, with overrides; problems are in the result.

    Raises:
        ReplayError: R001, the run recorded none.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ReplayError("R001", f"{folder} has no {CONFIG_FILE}, which a run writes when it starts")
    values = read_json(path)
    values["trainer"] |= {"resume_mode": "disable", "default_local_dir": str(output or folder)}
    return load_recorded(values, str(path), overrides)


def replay(
    folder: Path, loaded: Loaded, step: int, *, first: int | None = None, output: Path | None = None
) -> list[ReplayedStep]:
    """Compute the steps of the run in `folder` up to `step` again, and compare their metrics.

    They start from the newest checkpoint before `first`, by default before `step`, from which on all steps are recorded, or
    from the run's beginning.

    Args:
        loaded: the result of `load_run`.
        output: a folder for metrics, samples and, by `trainer.save_freq`, checkpoints; None to write nothing.

    Raises:
        ReplayError: R002, the step is not recorded; R003, there is nothing to start from; R004, the configuration cannot be
            that of this run.
        IIVerlError: something that the configuration names is missing, or a worker failed.
    """
    folders = _recorded_folders(folder)
    checkpoint, steps = _where_to_start(folder, folders, first or step, step)
    _check_configuration(folder, loaded)
    with ExitStack() as stack:
        local = output or Path(stack.enter_context(TemporaryDirectory(prefix="iiverl-replay-")))
        run = _without_engine(loaded.run, local, writes=output is not None)
        start_ray(run, stack)
        plan = make_plan(run)
        progress = stack.enter_context(Progress(step, steps[0] - 1, step_lines=False))
        facts = {
            CONFIG_FILE: loaded.config.model_dump(mode="json"),
            VERSIONS_FILE: versions(),
            DATASET_FILE: plan.prompts.fingerprint(),
        }
        start = Start(initial_state(run))
        if checkpoint is not None:
            start = _start(loaded, checkpoint, facts, progress)
        seen = _Seen()
        trackers: dict[str, Tracker] = {"replay": seen}
        if output is not None:
            trackers["output"] = _write_to(output, run, facts)
            if plan.tokenizer:
                write_tokenizer(plan.tokenizer, output / SAMPLES_FOLDER)
        tracker = Trackers(trackers)
        stack.callback(tracker.close)

        def recorded(
            workers: WorkerClient, observer: Observer, saved: Sequence[StepData], closing: ExitStack
        ) -> RecordedRollouts:
            return RecordedRollouts(run, folders, plan.prompts, workers, start.state, saved)

        watchdog = Watchdog(run.trainer.stall_timeout, run.folder, progress)
        parts = progress, watchdog, Stop(), tracker, recorded
        with watchdog.watching(), started(run, plan, start, facts, *parts) as trainer:
            for _ in steps:
                trainer.next_step()
            trainer.checkpoints.finish()
    history = {record["step"]: _comparable(record) for record in read_history(folder)}
    return [ReplayedStep(each, history.get(each), _comparable(seen.metrics[each])) for each in steps]


def _recorded_folders(folder: Path) -> dict[int, Path]:
    """Find the recorded steps of a run, also if its folder was moved, and one that ended it with NaN or infinity."""
    return recorded_steps([samples_folder(folder), folder / SAMPLES_FOLDER, folder / NONFINITE])


def _where_to_start(
    folder: Path, folders: Mapping[int, Path], first: int, step: int
) -> tuple[Checkpoint | None, range]:
    """Choose the checkpoint before `first` to start from, None for the run's beginning, and the steps to compute."""
    if step not in folders:
        known = f"recorded are steps {min(folders)} to {max(folders)}" if folders else "no step is recorded"
        raise ReplayError(
            "R002",
            f"the rollouts of step {step} are not recorded in {samples_folder(folder)}: {known}. A run records its steps "
            "with trainer.rollout_data_dir and trainer.record_rollouts; steps with images are not recorded",
        )
    before = sorted((each for each in checkpoints(folder) if each.step < first), key=lambda each: -each.step)
    starts = [(each, range(each.step + 1, step + 1)) for each in before] + [(None, range(1, step + 1))]
    for checkpoint, steps in starts:
        missing = [str(each) for each in steps if each not in folders]
        if not missing:
            return checkpoint, steps
    newest = f"after {before[0].folder}" if before else "and no checkpoint is saved before it"
    absent = [str(each) for each in starts[0][1] if each not in folders]
    raise ReplayError(
        "R003",
        f"step {first} has nothing to start from: step{'s' * (len(absent) > 1)} {join_names(absent)} {'are' if len(absent) > 1 else 'is'} not recorded {newest}. Save checkpoints "
        "more often (trainer.save_freq), or record every step (trainer.rollout_data_dir)",
    )


def _check_configuration(folder: Path, loaded: Loaded) -> None:
    changes = compare_config(read_json(folder / CONFIG_FILE), loaded.config, loaded.run.roles)
    if reason := forbidden(changes):
        raise ReplayError("R004", f"the run's steps cannot be computed with this configuration:\n{reason}")


def _start(loaded: Loaded, checkpoint: Checkpoint, facts: Mapping[str, Any], progress: Progress) -> Start:
    with progress.phase("checking the checkpoint"):
        verify(checkpoint.folder)
    try:
        other_backend = compare_run(loaded, checkpoint, facts, progress.log)
    except CheckpointError as error:
        raise ReplayError("R004", str(error)) from error
    return Start(read_state(checkpoint), checkpoint, other_backend)


def _without_engine(run: RunConfig, folder: Path, *, writes: bool) -> RunConfig:
    """Give the run that computes recorded steps: without engine, scorers and validation, and with files in `folder` alone."""
    trainer = run.trainer.model_copy(
        update={
            "default_local_dir": str(folder),
            "rollout_data_dir": str(folder / SAMPLES_FOLDER) if writes else None,
            "save_freq": run.trainer.save_freq if writes else -1,
            "rollout_devices": None,
            "max_staleness": 0,
            "val_before_train": False,
            "val_only": False,
            "test_freq": -1,
        }
    )
    return replace(
        run,
        generates=False,
        trainer=trainer,
        roles={role: each for role, each in run.roles.items() if role != "reward"},
        rewards=replace(run.rewards, api=run.rewards.api.model_copy(update={"enable": False})),
        profile=None,
    )


def _write_to(output: Path, run: RunConfig, facts: Mapping[str, Any]) -> Tracker:
    """Write to a folder what a run writes when it starts, and make the tracker that writes its metrics there."""
    output.mkdir(parents=True, exist_ok=True)
    for name in (CONFIG_FILE, VERSIONS_FILE):
        (output / name).write_text(to_json(facts[name]), "utf-8")
    trainer = run.trainer
    return make_trackers(["jsonl"], output, trainer.project_name, trainer.experiment_name, facts[CONFIG_FILE])


class _Seen:
    """A tracker that keeps the metrics of each step."""

    def __init__(self) -> None:
        self.metrics: dict[int, dict[str, float]] = {}

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.metrics[step] = self.metrics.get(step, {}) | dict(metrics)

    def log_generations(self, rows: Sequence[Generation], step: int) -> None: ...

    def close(self) -> None: ...


def _comparable(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """Select the metrics that a replay has too, as `metrics.jsonl` has them: None if they are not finite."""
    return {
        name: value if value is not None and math.isfinite(value) else None
        for name, value in metrics.items()
        if name != "step" and not name.startswith((*CLOCKS, VALIDATION))
    }
