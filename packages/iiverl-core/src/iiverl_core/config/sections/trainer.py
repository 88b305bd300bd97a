"""The section `trainer`: length of the run, devices, validation and logging."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from iiverl_core.config.sections.choices import WITH_CRITIC, Logger
from iiverl_core.config.sections.section import (
    Count,
    Int,
    Natural,
    NoEffect,
    OnlyWhen,
    PathStr,
    Section,
    one_or_more,
)

Frequency = Annotated[Int, Field(ge=-1)]


class TrainerConfig(Section):
    """Length of the run, devices, validation and logging."""

    runtime: Literal["ray", "local"] = "ray"
    """One process per device under Ray, or everything in this process, where breakpoints work."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Kind of device; `auto` uses GPUs if there are any."""
    nnodes: Count = 1
    """Number of machines."""
    n_gpus_per_node: Count = 8
    """Devices per machine; without GPUs, processes."""
    rollout_devices: Count | None = None
    """Additional devices that only generate; null if the training devices also generate."""
    max_staleness: Natural = 0
    """Training steps by which the weights that generate may be older than in turns; 0 to generate and train in turn.

    From 1 on, the `rollout_devices` generate the responses of coming steps while the others train."""
    deterministic: bool = False
    """Let torch, flash-attn, cuBLAS, NCCL and vLLM compute in one order on GPUs, which takes longer; on CPUs they do anyway.

    With tools or environments, an engine also waits for all rollouts before each step."""
    balance_batch: bool = True
    """Balance the number of tokens among devices."""
    total_epochs: Count = 30
    """Passes over the training prompts."""
    total_training_steps: Count | None = None
    """Training steps; null for `total_epochs`."""
    critic_warmup: Annotated[Natural, WITH_CRITIC] = 0
    """First step (1-based) at which the actor is trained; earlier steps train only the critic."""
    project_name: str = "verl_examples"
    """Name of the project, in trackers and in the path of the run's folder."""
    experiment_name: str = "gsm8k"
    """Name of the run, in trackers and in the path of its folder."""
    logger: Annotated[
        tuple[Logger, ...], BeforeValidator(one_or_more, json_schema_input_type=Logger | tuple[Logger, ...])
    ] = ("console", "tensorboard", "jsonl")
    """Trackers that log the metrics."""
    val_before_train: bool = True
    """Validate before the first step."""
    val_only: bool = False
    """Stop after the validation before training."""
    test_freq: Frequency = -1
    """Steps between validations; -1 for none."""
    log_val_generations: Natural = 0
    """Responses per validation to show in trackers."""
    val_generations_to_log_to_wandb: Natural = 0
    """Former name of `log_val_generations`; the larger of the two counts."""
    default_local_dir: PathStr = "checkpoints/${trainer.project_name}/${trainer.experiment_name}"
    """Folder of the run, for metrics and checkpoints."""
    rollout_data_dir: PathStr | None = None
    """Folder for the samples of each training step, as parquet; null to write none."""
    record_rollouts: bool = True
    """Also write the tokens and outcomes of each training step to `rollout_data_dir`, from which `iiverl replay` computes it again.

    Steps with images are not recorded."""
    validation_data_dir: PathStr | None = None
    """Folder for the samples of each validation, as parquet; null to write none."""
    save_freq: Frequency = -1
    """Steps between checkpoints, with one more after the last step; -1 or 0 for none."""
    save_best: str | None = None
    """Metric whose highest value marks the checkpoint to keep beside the newest, such as `val/test_score/SOURCE`."""
    resume_mode: PathStr = "auto"
    """Resume from the newest checkpoint in the run's folder (`auto`), from a `…/global_step_N` folder, or never (`disable`)."""
    resume_from_path: Annotated[
        PathStr | Literal[False] | None, OnlyWhen("trainer.resume_mode", ("resume_path",))
    ] = False
    """Folder of the checkpoint to resume from."""
    max_actor_ckpt_to_keep: Count | None = None
    """Newest checkpoints to keep; null for all. The smaller of the limits of actor and critic counts."""
    max_critic_ckpt_to_keep: Count | None = None
    """Newest checkpoints to keep, if there is a critic; null for all."""
    remove_previous_ckpt_in_save: bool = False
    """Keep only the newest checkpoint."""
    del_local_ckpt_after_load: Annotated[
        bool, NoEffect("a checkpoint is deleted only when a newer one is complete")
    ] = False
    """Delete a checkpoint after it is loaded."""
    max_restarts: Natural = 3
    """Restarts from the newest checkpoint after a worker's process died, without a new checkpoint in between; 0 for none."""
    grace_seconds: Natural = 60
    """Seconds after SIGTERM in which the current step may finish and be saved; 0 to stop at once."""
    stall_timeout: Natural = 1800
    """Seconds without any progress, in any process, after which the run is restarted or ended; 0 to wait forever."""
    placement_timeout: Annotated[Count | None, OnlyWhen("trainer.runtime", ("ray",))] = None
    """Seconds to wait for a Ray cluster whose machines are still starting, or are added when they are asked for; null for 60, and for none if the cluster lacks machines or GPUs."""
    max_nonfinite_updates: Natural = 3
    """Consecutive updates with a loss or gradient that is not finite before the run stops; 0 for no limit."""
    default_hdfs_dir: Annotated[str | None, NoEffect("nothing is copied to HDFS")] = None
    """Folder on HDFS for copies of the checkpoints."""

    @property
    def logged_generations(self) -> int:
        """Responses of a validation that are shown in the trackers, under either name of the key."""
        return max(self.log_val_generations, self.val_generations_to_log_to_wandb)
