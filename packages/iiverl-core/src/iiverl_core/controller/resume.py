"""Find where a run starts: at the beginning, or from a checkpoint."""

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from iiverl_core.checkpoints import (
    CONFIG_FILE,
    DATASET_FILE,
    STATE_FILE,
    VERSIONS_FILE,
    Checkpoint,
    check_writable,
    clean,
    compare_config,
    compare_dataset,
    compare_versions,
    forbidden,
    latest,
    missing_contents,
    read_json,
    verify,
    versions,
)
from iiverl_core.checkpoints.storage import step_folders
from iiverl_core.config import Config, Loaded, RunConfig
from iiverl_core.controller.collector import Plan
from iiverl_core.controller.state import TrainState
from iiverl_core.errors import CheckpointError
from iiverl_core.telemetry.earlier_runs import set_aside, set_aside_after

Log = Callable[[str], None]


@dataclass(frozen=True)
class Start:
    """The initial state of a run, and the checkpoint of its models; None if they come from the configuration.

    With `other_backend`, another backend wrote the checkpoint, so only its weights can be read.
    """

    state: TrainState
    checkpoint: Checkpoint | None = None
    other_backend: bool = False


def facts(loaded: Loaded, plan: Plan) -> dict[str, Any]:
    """Collect what a checkpoint records about its run, by file; the dataset's fingerprint only if something reads it."""
    trainer, folder = loaded.run.trainer, loaded.run.folder
    found = {CONFIG_FILE: loaded.config.model_dump(mode="json"), VERSIONS_FILE: versions()}
    may_resume = trainer.resume_mode not in ("auto", "disable") or bool(step_folders(folder))
    if trainer.save_freq > 0 or may_resume:
        found[DATASET_FILE] = plan.prompts.fingerprint()
    return found


def find_start(
    loaded: Loaded, recorded: Mapping[str, Any], log: Log, earlier: TrainState | None = None
) -> Start:
    """Find where a run starts according to `trainer.resume_mode`, and clear its folder of later results.

    Metrics and samples of later steps, or of an earlier run, are kept under other names.

    Args:
        recorded: the result of `facts` for this run.
        log: called with what is resumed, what is skipped and why, and what has changed since.
        earlier: the state of this run when it restarts, which it does from its newest checkpoint.

    Raises:
        CheckpointError: the checkpoint is not valid, or belongs to another model or dataset; or the folder cannot be
            written.
    """
    run = loaded.run
    if run.trainer.save_freq > 0:
        check_writable(run.folder)
    clean(run.folder)
    checkpoint = _select_checkpoint(run, run.trainer.resume_mode if earlier is None else "auto", log)
    if checkpoint is None:
        set_aside(_run_outputs(run), log)
        state = initial_state(run)
        return Start(state if earlier is None else replace(state, run_id=earlier.run_id))
    state = read_state(checkpoint)
    log(f"resuming after step {state.step} from {checkpoint.folder}")
    other_backend = compare_run(loaded, checkpoint, recorded, log)
    if checkpoint.folder.parent == run.folder:
        set_aside_after(state.step, run.folder, _dump_folders(run), log)
    else:
        set_aside(_run_outputs(run), log)
    return Start(state, checkpoint, other_backend)


def read_state(checkpoint: Checkpoint) -> TrainState:
    """Read the state of a run at a checkpoint.

    Raises:
        CheckpointError: it cannot be read.
    """
    path = checkpoint.folder / STATE_FILE
    try:
        return TrainState.from_json(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _select_checkpoint(run: RunConfig, mode: str, log: Log) -> Checkpoint | None:
    if mode == "disable":
        return None
    if mode != "auto":
        folder = Path(run.trainer.resume_from_path or "" if mode == "resume_path" else mode).absolute()
        return verify(folder)
    if step_folders(run.folder):
        log(f"looking for the newest checkpoint in {run.folder}")  # reading one of many GB takes minutes
    found = latest(run.folder)
    for _, reason in found.passed_over:
        log(f"warning: {reason}")
    if found.pointer_problem:
        log(f"warning: {found.pointer_problem}; the checkpoints themselves say which is the newest")
    return found.checkpoint


def compare_run(loaded: Loaded, checkpoint: Checkpoint, recorded: Mapping[str, Any], log: Log) -> bool:
    """Report what has changed since a checkpoint was written, and return whether another backend wrote it.

    Raises:
        CheckpointError: the run cannot continue from it.
    """
    then = {name: read_json(checkpoint.folder / name) for name in recorded}
    changes = compare_dataset(then[DATASET_FILE], recorded[DATASET_FILE])
    changes += compare_config(then[CONFIG_FILE], loaded.config, checkpoint.roles)
    changes += compare_versions(then[VERSIONS_FILE], recorded[VERSIONS_FILE])
    saved_backend = Config.model_validate(then[CONFIG_FILE]).backend
    other_backend = saved_backend != loaded.run.backend
    missing = missing_contents(then[CONFIG_FILE], checkpoint.folder, reads_optimizer=not other_backend)
    if reason := forbidden(changes) or missing:
        raise CheckpointError(f"{checkpoint.folder} cannot be resumed:\n{reason}")
    if other_backend:
        log(
            f"warning: the checkpoint is of {saved_backend}: {loaded.run.backend} takes over its weights, and the "
            "optimizer starts again, without the moments of its gradients"
        )
    for change in changes:
        if change.effect != "harmless":
            log(f"changed since the checkpoint: {change}")
    return other_backend


def _dump_folders(run: RunConfig) -> list[Path]:
    folders = (run.trainer.rollout_data_dir, run.trainer.validation_data_dir)
    return [Path(folder) for folder in dict.fromkeys(folders) if folder]


def _run_outputs(run: RunConfig) -> list[Path]:
    """List the files that a run writes to its folders, including checkpoints."""
    names = (
        "metrics.jsonl",
        "generations.jsonl",
        "tensorboard",
        "reward.png",
        "report.html",
        CONFIG_FILE,
        VERSIONS_FILE,
    )
    return [*(run.folder / name for name in names), *_dump_folders(run), *step_folders(run.folder)]


def initial_state(run: RunConfig) -> TrainState:
    """Create the state before the first step."""
    kl_coef = run.algorithm.kl_ctrl.kl_coef if run.kl_in_reward else 0.0
    return TrainState(kl_coef=kl_coef, run_id=secrets.token_hex(8))
