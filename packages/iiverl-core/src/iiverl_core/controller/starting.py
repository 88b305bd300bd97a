"""Start the workers of a run, with the models of its checkpoint, and build the trainer that calls them."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

from iiverl_core.cluster.engines import ColocatedEngines, Engines, NoEngines
from iiverl_core.cluster.runtime import WorkerGroup
from iiverl_core.config import RunConfig
from iiverl_core.controller.checkpointing import Checkpointer
from iiverl_core.controller.collector import Plan, StepData
from iiverl_core.controller.models import shapes
from iiverl_core.controller.observer import Observer
from iiverl_core.controller.resume import Start
from iiverl_core.controller.saved_rollouts import read_rollouts
from iiverl_core.controller.trainer import StepRollouts, Trainer
from iiverl_core.controller.watchdog import Watchdog
from iiverl_core.controller.worker_client import WorkerClient
from iiverl_core.garbage import collect_rarely
from iiverl_core.memory import checkpoint_bytes
from iiverl_core.stopping import Stop
from iiverl_core.telemetry import Progress, Tracker

MakeRollouts: TypeAlias = Callable[[WorkerClient, Observer, Sequence[StepData], ExitStack], StepRollouts]
"""Makes the source of a run's rollouts. It gets those that the checkpoint held, and a stack that is closed at its end."""


@contextmanager
def started(
    run: RunConfig,
    plan: Plan,
    start: Start,
    recorded: Mapping[str, Any],
    progress: Progress,
    watchdog: Watchdog,
    stop: Stop,
    tracker: Tracker,
    make_rollouts: MakeRollouts,
) -> Iterator[Trainer]:
    """Start the workers of a run and load its checkpoint; give the trainer, and always stop the workers.

    Raises:
        IIVerlError: a worker cannot start, or the checkpoint cannot be loaded.
    """
    with ExitStack() as exit_stack:
        processes = run.devices + (run.trainer.rollout_devices or 0)
        starting = f"starting {processes} worker{'s' * (processes > 1)}"
        with _weights(run, start, progress) as from_weights, progress.phase(starting):
            group, engines = _start(from_weights, progress.log, watchdog, exit_stack)
        workers = WorkerClient(group, engines, run)
        saved: Sequence[StepData] = ()
        if start.checkpoint is not None:
            with progress.phase("loading the checkpoint"):
                if not start.other_backend:
                    workers.load(start.checkpoint.folder)
                saved = read_rollouts(start.checkpoint.folder, plan.prompts, workers)
        observer = Observer(run, group.infos, shapes(run, group.infos[0].parameters), progress, tracker)
        counted = group.infos[0]
        size = checkpoint_bytes(run, counted.trained_parameters, counted.parameters["actor"])
        checkpointer = Checkpointer(run, workers, recorded, size, progress.log)
        exit_stack.callback(checkpointer.close)
        rollouts = make_rollouts(workers, observer, saved, exit_stack)
        yield Trainer(run, plan, workers, rollouts, observer, checkpointer, start.state, stop)


def start_ray(run: RunConfig, exit_stack: ExitStack) -> None:
    """Start Ray if the run uses it; closing `exit_stack` ends it."""
    if run.trainer.runtime == "ray":
        from iiverl_core.cluster.ray_start import ray_for  # Ray may not be installed

        exit_stack.enter_context(ray_for(run))


@contextmanager
def _weights(run: RunConfig, start: Start, progress: Progress) -> Iterator[RunConfig]:
    """Convert the weights of a checkpoint of another backend, and give the run that starts from them; else the run."""
    if start.checkpoint is None or not start.other_backend:
        yield run
        return
    from iiverl_core.cluster.export import start_from_weights  # imports torch

    folder = run.folder / f".global_step_{start.checkpoint.step}.weights"
    try:
        with progress.phase("converting the checkpoint"):
            from_weights = start_from_weights(run, start.checkpoint, folder)
        yield from_weights
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _start(
    run: RunConfig, log: Callable[[str], None], watchdog: Watchdog, exit_stack: ExitStack
) -> tuple[WorkerGroup, Engines]:
    """Start the trainer workers and the engines; closing `exit_stack` stops them."""
    if run.trainer.runtime == "local":
        from iiverl_core.cluster.local import LocalGroup

        group = LocalGroup(run)
        exit_stack.callback(group.close)
        return group, _colocated(run, group)
    collect_rarely()
    # The local runtime does not need Ray, which may not be installed.
    from iiverl_core.cluster.ray_engines import RayEngines
    from iiverl_core.cluster.ray_group import RayGroup, driver_heartbeats

    heartbeats = driver_heartbeats(watchdog.interval_s)
    watchdog.reports = heartbeats.read
    group = RayGroup(run, heartbeats, log)
    exit_stack.callback(group.close)
    if not run.trainer.rollout_devices:
        return group, _colocated(run, group)
    engines = RayEngines(run, group, log, heartbeats)
    exit_stack.callback(engines.close)
    return group, engines


def _colocated(run: RunConfig, group: WorkerGroup) -> Engines:
    if not run.generates:
        return NoEngines()
    return ColocatedEngines(group, run.engine_devices, keep_base=run.syncs_adapters)
