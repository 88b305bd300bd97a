"""A run from its configuration to its report: build everything in the order in which it can fail cheaply, and loop."""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import AutoConfig

from iiverl_core.cluster.runtime import WorkerGroup
from iiverl_core.config import Config, Loaded
from iiverl_core.controller.observer import ModelShape, Observer
from iiverl_core.controller.trainer import Plan, Trainer
from iiverl_core.controller.workers import Workers
from iiverl_core.data import PromptOrder, PromptSet, load_prompts, load_tokenizer
from iiverl_core.rewards import Scorer, check_prompts, make_scorer
from iiverl_core.rewards.checking import check_before_run
from iiverl_core.telemetry import Progress, Tracker, make_trackers, read_history, report


def train(loaded: Loaded) -> None:
    """Run a checked configuration to its end, and report what came of it, however it ends.

    Raises:
        IIVerlError: what it names is not there or does not fit, or a worker failed.
    """
    config = loaded.config
    folder = Path(config.trainer.default_local_dir).expanduser()
    plan = _plan(config)
    scorer = make_scorer(config)
    tracker: Tracker | None = None
    try:
        progress = Progress(plan.total_steps)
        _set_aside(config, folder, progress.say)
        tracker = make_trackers(
            list(dict.fromkeys(["jsonl", *config.trainer.logger])),  # the report is made from it
            folder,
            config.trainer.project_name,
            config.trainer.experiment_name,
            config.model_dump(mode="json"),
            say=progress.say,
        )
        with progress:
            _loop(config, plan, scorer, progress, tracker)
    finally:
        scorer.close()
        if tracker is not None:
            tracker.close()
        if tracker is not None and read_history(folder):
            dumps = config.trainer.rollout_data_dir
            report(
                folder,
                config.trainer.experiment_name,
                total_steps=None if config.trainer.val_only else plan.total_steps,
                samples=Path(dumps).expanduser() if dumps else None,
                ended_well=sys.exc_info()[0] is None,
            )


def _loop(config: Config, plan: Plan, scorer: Scorer, progress: Progress, tracker: Tracker) -> None:
    """Start the workers, train, and end them whatever happens."""
    with progress.phase(f"starting {config.devices} worker{'s' * (config.devices > 1)}"):
        group = _start(config)
    try:
        observer = Observer(config, group.infos, _shape(config, group), progress, tracker)
        Trainer(config, plan, Workers(group, config), scorer, observer).fit()
    finally:
        group.close()


def _plan(config: Config) -> Plan:
    """Read the prompts and find how many steps they make."""
    data, trainer = config.data, config.trainer
    if config.reward_api.enable:
        check_before_run(config)  # before anything is tokenized: a wrong column costs a second
    tokenizer = load_tokenizer(config)

    def prompts_of(files: Sequence[str], splits: Sequence[str]) -> PromptSet:
        prompts = load_prompts(
            files,
            splits,
            tokenizer,
            max_prompt_length=config.actor_rollout_ref.rollout.prompt_length,
            prompt_key=data.prompt_key,
            filter_overlong=data.filter_overlong_prompts,
            truncation=data.truncation,
        )
        check_prompts(config, prompts)
        return prompts

    prompts = prompts_of(data.train_files, data.train_split)
    validates = trainer.val_before_train or trainer.val_only or trainer.test_freq > 0
    val_prompts = prompts_of(data.val_files, data.val_split) if data.val_files and validates else None
    order = PromptOrder(len(prompts), data.train_batch_size, seed=data.seed, shuffle=data.shuffle)
    steps = trainer.total_training_steps or order.steps_per_epoch * trainer.total_epochs
    return Plan(prompts, order, val_prompts, steps)


def _start(config: Config) -> WorkerGroup:
    if config.trainer.runtime == "local":
        from iiverl_core.cluster.local import LocalGroup

        return LocalGroup(config)
    from iiverl_core.cluster.ray_group import (
        RayGroup,  # Ray is not needed, and may not be there, without this
    )

    return RayGroup(config)


def _shape(config: Config, group: WorkerGroup) -> ModelShape:
    model = config.actor_rollout_ref.model
    text = AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code).get_text_config()
    heads = text.num_attention_heads
    return ModelShape(
        parameters=group.infos[0].parameters,
        layers=text.num_hidden_layers,
        heads=heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
    )


def _set_aside(config: Config, folder: Path, say: Callable[[str], None]) -> None:
    """Keep what an earlier run left in the same places, under other names: two runs in one curve explain nothing."""
    dumps = (config.trainer.rollout_data_dir, config.trainer.validation_data_dir)
    written = [folder / "metrics.jsonl", folder / "tensorboard", folder / "reward.png"]
    written += [Path(dump).expanduser() for dump in dict.fromkeys(dumps) if dump]
    for path in written:
        if path.is_dir() and not any(path.iterdir()):
            continue
        if path.exists():
            stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(path.stat().st_mtime))
            kept = path.with_name(f"{path.stem}-{stamp}{path.suffix}")
            path.rename(kept)
            say(f"an earlier run's {path.name} is kept as {kept}")
