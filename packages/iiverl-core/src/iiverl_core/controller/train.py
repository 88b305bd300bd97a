"""A run from its configuration to its report: build everything in the order in which it can fail cheaply, and loop."""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from iiverl_core.cluster.engines import ColocatedEngines, Engines
from iiverl_core.cluster.runtime import WorkerGroup
from iiverl_core.config import Loaded, RunConfig
from iiverl_core.controller.collector import Plan
from iiverl_core.controller.models import check_engine_devices, check_vocabularies, shapes
from iiverl_core.controller.observer import Observer
from iiverl_core.controller.trainer import Trainer
from iiverl_core.controller.worker_client import WorkerClient
from iiverl_core.data import PromptOrder, PromptSet, load_prompts, load_tokenizer
from iiverl_core.rewards import (
    Scorer,
    add_reward_model,
    check_ground_truths,
    check_prompts,
    check_reward_model,
    make_scorer,
)
from iiverl_core.rewards.checking import check_before_run
from iiverl_core.rewards.custom import load_custom_function
from iiverl_core.telemetry import Progress, Tracker, make_trackers, read_history, report


class Closing(Protocol):
    """What holds processes, and ends them."""

    def close(self) -> None:
        """End all of them. May be called twice."""
        ...


def train(loaded: Loaded) -> None:
    """Run a checked configuration to its end, and report what came of it, however it ends.

    Raises:
        IIVerlError: what it names is not there or does not fit, or a worker failed.
    """
    run = loaded.run
    folder = Path(run.trainer.default_local_dir).expanduser()
    plan = prepare(loaded)
    scorer = make_scorer(run)
    tracker: Tracker | None = None
    try:
        progress = Progress(plan.total_steps, step_lines="console" not in run.trainer.logger)
        _set_aside(run, folder, progress.log)
        tracker = make_trackers(
            list(dict.fromkeys(["jsonl", *run.trainer.logger])),  # the report is made from it
            folder,
            run.trainer.project_name,
            run.trainer.experiment_name,
            loaded.config.model_dump(mode="json"),
            log=progress.log,
            total_steps=plan.total_steps,
        )
        with progress:
            _loop(run, plan, scorer, progress, tracker)
    finally:
        if scorer is not None:
            scorer.close()
        if tracker is not None:
            tracker.close()
        if tracker is not None and read_history(folder):
            dumps = run.trainer.rollout_data_dir
            report(
                folder,
                run.trainer.experiment_name,
                total_steps=None if run.trainer.val_only else plan.total_steps,
                samples=Path(dumps).expanduser() if dumps else None,
                ended_well=sys.exc_info()[0] is None,
            )


def _loop(
    run: RunConfig,
    plan: Plan,
    scorer: Scorer | None,
    progress: Progress,
    tracker: Tracker,
) -> None:
    """Start the workers, train, and end them whatever happens."""
    started: list[Closing] = []
    try:
        processes = run.devices + (run.trainer.rollout_devices or 0)
        with progress.phase(f"starting {processes} worker{'s' * (processes > 1)}"):
            group, engines = _start(run, progress.log, started)
        workers = WorkerClient(group, engines, run)
        observer = Observer(run, group.infos, shapes(run, group.infos[0].parameters), progress, tracker)
        if run.uses_reward_model or scorer is None:
            scorer = add_reward_model(run, scorer, workers.score)
        Trainer(run, plan, workers, scorer, observer).fit()
    finally:
        if scorer is not None:
            scorer.close()
        for part in reversed(started):
            part.close()


def prepare(loaded: Loaded) -> Plan:
    """Check everything that can be checked without a worker, read the prompts, and find how many steps they make.

    The user's own code is imported, the reward server is asked, and every prompt is tokenized.

    Raises:
        IIVerlError: what the configuration names is not there or does not fit.
    """
    run = loaded.run
    data, trainer = run.data, run.trainer
    from iiverl_core.algorithms import find_estimator, find_policy_loss  # imports torch, unlike the loop

    find_estimator(run.algorithm.adv_estimator)  # a user's own file may not be as it should
    find_policy_loss(run.loss.policy_loss)
    if run.rewards.function.path is not None:
        load_custom_function(run.rewards.function)
    if run.rewards.api.enable:
        check_before_run(run)  # before anything is tokenized: a wrong column costs a second
    tokenizer = load_tokenizer(run)
    check_reward_model(run)
    check_vocabularies(run, len(tokenizer))
    check_engine_devices(run)

    def prompts_of(files: Sequence[str], splits: Sequence[str]) -> PromptSet:
        prompts = load_prompts(
            files,
            splits,
            tokenizer,
            max_prompt_length=run.rollout.prompt_length,
            prompt_key=data.prompt_key,
            ground_truth_key=data.ground_truth_key,
            data_source_key=data.data_source_key,
            filter_overlong=data.filter_overlong_prompts,
            truncation=data.truncation,
        )
        check_ground_truths(run, prompts)
        check_prompts(run, prompts)
        return prompts

    prompts = prompts_of(data.train_files, data.train_split)
    validates = trainer.val_before_train or trainer.val_only or trainer.test_freq > 0
    val_prompts = prompts_of(data.val_files, data.val_split) if data.val_files and validates else None
    filtered = run.algorithm.filter_groups.enable
    drawn = data.gen_batch_size if filtered else data.train_batch_size
    order = PromptOrder(len(prompts), drawn, seed=data.seed, shuffle=data.shuffle)
    steps = trainer.total_training_steps or len(prompts) // data.train_batch_size * trainer.total_epochs
    return Plan(prompts, order, val_prompts, steps)


def _start(run: RunConfig, log: Callable[[str], None], started: list[Closing]) -> tuple[WorkerGroup, Engines]:
    """Start the processes that train and the engines; what has to be ended is put into `started` as it starts."""
    if run.trainer.runtime == "local":
        from iiverl_core.cluster.local import LocalGroup

        group = LocalGroup(run)
        started.append(group)
        return group, ColocatedEngines(group, run.engine_devices)
    from iiverl_core.cluster.ray_engines import (
        RayEngines,  # Ray is not needed, and may not be there, without this
    )
    from iiverl_core.cluster.ray_group import RayGroup

    group = RayGroup(run)
    started.append(group)
    if not run.trainer.rollout_devices:
        return group, ColocatedEngines(group, run.engine_devices)
    engines = RayEngines(run, group, log)
    started.append(engines)
    return group, engines


def _set_aside(run: RunConfig, folder: Path, log: Callable[[str], None]) -> None:
    """Keep what an earlier run left in the same places, under other names: two runs in one curve explain nothing."""
    dumps = (run.trainer.rollout_data_dir, run.trainer.validation_data_dir)
    names = ("metrics.jsonl", "generations.jsonl", "tensorboard", "reward.png")
    written = [folder / name for name in names]
    written += [Path(dump).expanduser() for dump in dict.fromkeys(dumps) if dump]
    for path in written:
        if path.is_dir() and not any(path.iterdir()):
            continue
        if path.exists():
            stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(path.stat().st_mtime))
            kept = path.with_name(f"{path.stem}-{stamp}{path.suffix}")
            path.rename(kept)
            log(f"an earlier run's {path.name} is kept as {kept}")
