"""A run from its configuration to its report: check and build everything, cheapest failures first, then train."""

import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from iiverl_core.checkpoints import CONFIG_FILE, VERSIONS_FILE, checkpoints, to_json
from iiverl_core.cluster.runtime import WorkerDiedError
from iiverl_core.config import Loaded, RunConfig
from iiverl_core.controller.collector import Plan, StepData
from iiverl_core.controller.folders import check_folders
from iiverl_core.controller.models import (
    check_engine_devices,
    check_positions,
    check_turn_end,
    check_vocabularies,
)
from iiverl_core.controller.observer import Observer
from iiverl_core.controller.resume import Start, facts, find_start
from iiverl_core.controller.rollout_queue import RolloutQueue
from iiverl_core.controller.starting import start_ray, started
from iiverl_core.controller.watchdog import Watchdog
from iiverl_core.controller.worker_client import WorkerClient
from iiverl_core.data import (
    PromptOrder,
    PromptSet,
    load_image_processor,
    load_prompts,
    load_tokenizer,
    too_few_prompts,
    write_tokenizer,
)
from iiverl_core.errors import NonFiniteError
from iiverl_core.garbage import importing
from iiverl_core.rewards import (
    add_reward_model,
    check_ground_truths,
    check_prompts,
    check_reward_model,
    make_scorer,
)
from iiverl_core.rewards.checking import check_before_run
from iiverl_core.rewards.custom import load_custom_function
from iiverl_core.stopping import Stop
from iiverl_core.telemetry import (
    Progress,
    RunLock,
    RunRecorder,
    make_trackers,
    read_history,
    report,
    sample_files,
)
from iiverl_core.telemetry.html_report import HTML_REPORT, ReportedRun, write_html_report
from iiverl_core.telemetry.trackers import Trackers


def train(loaded: Loaded, stop: Stop | None = None) -> None:
    """Run a validated configuration from its beginning or its newest checkpoint to its end, and write the report.

    Args:
        stop: a request to end the run after the current step, with a checkpoint.

    Raises:
        IIVerlError: something that the configuration names is missing or unsuitable, a worker failed, or a checkpoint
            cannot be read or written.
    """
    run, stop = loaded.run, stop or Stop()
    with RunLock(run.folder, print), ExitStack() as ray:
        with importing():
            check_functions(run)
            start_ray(run, ray)
            plan = make_plan(run)
        progress = Progress(plan.total_steps, step_lines="console" not in run.trainer.logger)
        check_folders(loaded)
        _train(loaded, plan, progress, stop, ray)


def prepare(loaded: Loaded) -> Plan:
    """Check everything that can be checked without a worker, as a run does before it starts.

    Raises:
        IIVerlError: something that the configuration names is missing or unsuitable.
    """
    check_functions(loaded.run)
    return make_plan(loaded.run)


def _train(loaded: Loaded, plan: Plan, progress: Progress, stop: Stop, ray: ExitStack) -> None:
    """Run in a folder that no other run uses, again after a worker's death, and write the report."""
    run = loaded.run
    recorded = facts(loaded, plan)
    start = find_start(loaded, recorded, progress.log)
    if start.state.step >= plan.total_steps and not run.trainer.val_only:
        progress.log(
            f"nothing is left to do: {run.folder} has step {start.state.step} of {plan.total_steps}. To train on, raise "
            "trainer.total_epochs or total_training_steps; to begin again, set trainer.resume_mode: disable"
        )
        return
    try:
        with progress, _recorder(run, plan) as recorder:
            for name in (CONFIG_FILE, VERSIONS_FILE):  # also of a run that saves no checkpoint
                (run.folder / name).write_text(to_json(recorded[name]), "utf-8")
            if run.trainer.rollout_data_dir and run.trainer.record_rollouts and plan.tokenizer:
                write_tokenizer(plan.tokenizer, Path(run.trainer.rollout_data_dir))
            restarts = 0
            while True:
                try:
                    _run(run, plan, start, recorded, progress, stop)
                    break
                except WorkerDiedError as error:
                    saved = checkpoints(run.folder)
                    new = saved and (start.checkpoint is None or saved[-1].serial != start.checkpoint.serial)
                    restarts = 1 if new else restarts + 1
                    if stop.requested or run.trainer.save_freq <= 0 or restarts > run.trainer.max_restarts:
                        raise
                    progress.log(f"{error}\nrestarting ({restarts} of {run.trainer.max_restarts})")
                    start = find_start(loaded, recorded, progress.log, start.state)
                    ray.close()  # it may have suffered too
                    start_ray(run, ray)
                except NonFiniteError as error:
                    raise NonFiniteError(f"{error}\n{_way_back(run)}") from error
            recorder.end(stop.exit_code)
    finally:
        if read_history(run.folder):
            saved = checkpoints(run.folder)
            dumps = run.trainer.rollout_data_dir
            report(
                run.folder,
                run.trainer.experiment_name,
                total_steps=None if run.trainer.val_only else plan.total_steps,
                samples=Path(dumps) if dumps else None,
                checkpoint=saved[-1].folder if saved else None,
                ended_well=sys.exc_info()[0] is None,
            )


def _run(
    run: RunConfig,
    plan: Plan,
    start: Start,
    recorded: Mapping[str, Any],
    progress: Progress,
    stop: Stop,
) -> None:
    """Start the workers, train, and always stop the workers."""
    watchdog = Watchdog(run.trainer.stall_timeout, run.folder, progress)
    with watchdog.watching(), ExitStack() as last, ExitStack() as exit_stack:
        tracker = make_trackers(
            list(dict.fromkeys(["jsonl", *run.trainer.logger])),  # the report is based on it
            run.folder,
            run.trainer.project_name,
            run.trainer.experiment_name,
            recorded[CONFIG_FILE],
            log=progress.log,
            total_steps=plan.total_steps,
            run_id=start.state.run_id,
        )
        exit_stack.callback(tracker.close)
        if tracker.keeps_files:
            exit_stack.callback(_keep_files, run, tracker)
        scorer = make_scorer(run)
        if scorer is not None:
            exit_stack.callback(scorer.close)

        def generated(
            workers: WorkerClient, observer: Observer, saved: Sequence[StepData], closing: ExitStack
        ) -> RolloutQueue:
            scores = scorer
            if run.uses_reward_model or scores is None:
                scores = add_reward_model(run, scores, workers.score)
                closing.callback(scores.close)
            queue = RolloutQueue(run, plan, workers, scores, observer, start.state, saved)
            last.callback(queue.join)
            closing.callback(queue.close)
            return queue

        parts = progress, watchdog, stop, tracker, generated
        with started(run, plan, start, recorded, *parts) as trainer:
            trainer.fit()


def _keep_files(run: RunConfig, tracker: Trackers) -> None:
    """Give the report, and the samples of the newest step, to trackers whose services keep files."""
    report_file = run.folder / HTML_REPORT
    with suppress(OSError):
        write_html_report(report_file, [ReportedRun(run.trainer.experiment_name, run.folder)])
    files = {"report": report_file}
    if run.trainer.rollout_data_dir and (dumps := sample_files(Path(run.trainer.rollout_data_dir))):
        files["samples"] = dumps[max(dumps)]
    tracker.log_files(files)


def _way_back(run: RunConfig) -> str:
    """Say from which checkpoint a run that has diverged can be continued."""
    if saved := checkpoints(run.folder):
        return f"The newest checkpoint is {saved[-1].folder}; the same command continues from it."
    return "No checkpoint has been saved (trainer.save_freq)."


def check_functions(run: RunConfig) -> None:
    """Check the user's functions by importing them, and the reward server by asking it.

    Raises:
        IIVerlError: something that the configuration names is missing or unsuitable.
    """
    from iiverl_core.algorithms import find_estimator, find_policy_loss  # imports torch

    find_estimator(run.algorithm.adv_estimator)  # a user's file may be invalid
    find_policy_loss(run.loss.policy_loss)
    if run.rewards.function.path is not None:
        load_custom_function(run.rewards.function)
    if run.rewards.api.enable:
        check_before_run(run)  # before tokenizing, so that a wrong column fails within a second


def make_plan(run: RunConfig) -> Plan:
    """Read and tokenize the prompts, check them and the models' sizes, and count the steps.

    Raises:
        IIVerlError: something that the configuration names is missing or unsuitable.
    """
    data, trainer = run.data, run.trainer
    images = load_image_processor(run)
    tokenizer = images.tokenizer if images else load_tokenizer(run)
    vocabulary = check_vocabularies(run, len(tokenizer))
    check_positions(run)
    if run.generates:
        check_reward_model(run)
        check_engine_devices(run)

    def prompts_of(files: Sequence[str], splits: Sequence[str], max_samples: int | None) -> PromptSet:
        prompts = load_prompts(
            files,
            splits,
            tokenizer,
            max_prompt_length=run.rollout.prompt_length,
            prompt_key=data.prompt_key,
            ground_truth_key=data.ground_truth_key,
            data_source_key=data.data_source_key,
            tools_key=data.tools_key,
            images=images,
            image_key=data.image_key,
            template_kwargs=data.apply_chat_template_kwargs,
            vocabulary=vocabulary,
            filter_overlong=data.filter_overlong_prompts,
            truncation=data.truncation,
            max_samples=max_samples,
            seed=data.seed if data.shuffle else None,
        )
        if run.generates:
            check_ground_truths(run, prompts)
            check_prompts(run, prompts)
        return prompts

    prompts = prompts_of(data.train_files, data.train_split, data.train_max_samples)
    if run.generates and prompts[0].chat is not None:
        check_turn_end(run, tokenizer)
    validates = trainer.val_before_train or trainer.val_only or trainer.test_freq > 0
    val_prompts = None
    if data.val_files and validates:
        val_prompts = prompts_of(data.val_files, data.val_split, data.val_max_samples)
    filtered = run.algorithm.filter_groups.enable
    if filtered:
        key, batch_size = "data.gen_batch_size", data.gen_batch_size
    else:
        key, batch_size = "data.train_batch_size", data.train_batch_size
    order = PromptOrder(len(prompts), batch_size, seed=data.seed, shuffle=data.shuffle, key=key)
    steps = trainer.total_training_steps or len(prompts) // data.train_batch_size * trainer.total_epochs
    if not steps and not trainer.val_only:  # batches of gen_batch_size fit, but not one of train_batch_size
        raise too_few_prompts(len(prompts), "data.train_batch_size", data.train_batch_size)
    return Plan(prompts, order, val_prompts, steps, tokenizer)


def _recorder(run: RunConfig, plan: Plan) -> RunRecorder:
    trainer = run.trainer
    return RunRecorder(
        run.folder,
        trainer.experiment_name,
        total_steps=plan.total_steps,
        best_metric=trainer.save_best,
        samples=Path(trainer.rollout_data_dir) if trainer.rollout_data_dir else None,
    )
