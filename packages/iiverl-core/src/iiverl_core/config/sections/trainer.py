"""The section `trainer`: how long, on which devices, and what is written down."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from iiverl_core.config.sections.choices import WITH_CRITIC, Logger
from iiverl_core.config.sections.section import (
    Count,
    Int,
    Natural,
    NoEffect,
    NotYet,
    OnlyWhen,
    Path,
    Section,
    one_or_more,
)

Frequency = Annotated[Int, Field(ge=-1)]
CHECKPOINTS = NotYet("checkpoints", (None,), blocks=False)


class TrainerConfig(Section):
    """How long, on which devices, and what is written down."""

    runtime: Literal["ray", "local"] = "ray"
    """Run one process a device under Ray, or all of it in this process, where a breakpoint works."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What a device is; `auto` takes GPUs where there are any."""
    nnodes: Count = 1
    """Machines."""
    n_gpus_per_node: Count = 8
    """Devices on each machine; without GPUs, processes."""
    rollout_devices: Count | None = None
    """Devices on which engines only generate, besides those that train; null lets each device do both in turn."""
    balance_batch: bool = True
    """Give each device about the same number of tokens."""
    total_epochs: Count = 30
    """Passes over the training prompts."""
    total_training_steps: Count | None = None
    """Steps in all; null for what `total_epochs` gives."""
    critic_warmup: Annotated[Natural, WITH_CRITIC] = 0
    """Step, counted from 1, from which on not only the critic is trained but the actor too."""
    project_name: str = "verl_examples"
    """Project, in trackers and in the name of the run's folder."""
    experiment_name: str = "gsm8k"
    """Run, in trackers and in the name of its folder."""
    logger: Annotated[tuple[Logger, ...], BeforeValidator(one_or_more)] = ("console", "tensorboard", "jsonl")
    """Where metrics go."""
    val_before_train: bool = True
    """Validate before the first step."""
    val_only: bool = False
    """Stop after that validation."""
    test_freq: Frequency = -1
    """Steps from one validation to the next; -1 for none."""
    log_val_generations: Natural = 0
    """Responses of a validation that are shown in the trackers."""
    val_generations_to_log_to_wandb: Natural = 0
    """The same, under its former name; the larger of the two counts."""
    default_local_dir: Path = "checkpoints/${trainer.project_name}/${trainer.experiment_name}"
    """The run's folder: metrics, checkpoints."""
    rollout_data_dir: Path | None = None
    """Folder for the samples of each training step, as parquet; null for none."""
    validation_data_dir: Path | None = None
    """Folder for the samples of each validation, as parquet; null for none."""
    save_freq: Annotated[Frequency, NotYet("checkpoints", (-1, 0), blocks=False)] = -1
    """Steps from one checkpoint to the next; -1 for none."""
    resume_mode: Path = "auto"
    """Go on from the last checkpoint (`auto`), start anew (`disable`), or go on from a `…/global_step_N` folder."""
    resume_from_path: Annotated[
        Path | Literal[False] | None, OnlyWhen("trainer.resume_mode", ("resume_path",))
    ] = False
    """Folder of the checkpoint, with `resume_mode: resume_path`."""
    max_actor_ckpt_to_keep: Annotated[Count | None, CHECKPOINTS] = None
    """Checkpoints of the actor that are kept; null for all."""
    max_critic_ckpt_to_keep: Annotated[Count | None, CHECKPOINTS] = None
    """Checkpoints of the critic that are kept; null for all."""
    remove_previous_ckpt_in_save: Annotated[bool, NotYet("checkpoints", (False,), blocks=False)] = False
    """Keep only the last checkpoint."""
    del_local_ckpt_after_load: Annotated[bool, NotYet("checkpoints", (False,), blocks=False)] = False
    """Delete a checkpoint once it is loaded."""
    default_hdfs_dir: Annotated[str | None, NoEffect("nothing is copied to HDFS")] = None
    """Folder on HDFS for copies of the checkpoints."""

    @property
    def logged_generations(self) -> int:
        """Responses of a validation that are shown in the trackers, under either name of the key."""
        return max(self.log_val_generations, self.val_generations_to_log_to_wandb)
