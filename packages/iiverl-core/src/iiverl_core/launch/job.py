"""A run as a cluster sees it: machines, devices, the command, and the time that it needs to save itself."""

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil

from iiverl_core.config import Loaded
from iiverl_core.errors import ConfigError

STARTING_S = 600  # until the machines of a cluster have to be there
LEAD_S = 30  # between the end of a run's grace period and that of its machines


@dataclass(frozen=True)
class Job:
    """What a run asks of a cluster.

    `devices` are GPUs per machine or, without `gpus`, processes. `lead_s` is how many seconds before its end a run has
    to get SIGTERM, so that it can finish its step and save it.
    """

    name: str
    config: str | None
    overrides: tuple[str, ...]
    machines: int
    devices: int
    gpus: bool
    lead_s: int
    folder: str
    """The run's folder, for metrics and checkpoints."""

    def command(self, config: str | None, *more: str) -> str:
        """Return the shell command that starts the run with a configuration at this path, and `more` overrides."""
        words = ["iiverl", "train-ppo", *([config] if config else []), *self.overrides, *more]
        return shlex.join(words)


def job_of(loaded: Loaded, config: str | None, overrides: Sequence[str]) -> Job:
    """Describe the run of a valid configuration, which the file `config` and `overrides` give.

    Raises:
        ConfigError: the run uses no Ray, and so cannot span machines.
    """
    trainer = loaded.run.trainer
    if trainer.runtime != "ray":
        raise ConfigError(
            f"trainer.runtime: {trainer.runtime} runs in one process; set it to ray to use a cluster"
        )
    devices = loaded.run.devices + (trainer.rollout_devices or 0)
    waiting = () if trainer.placement_timeout else (f"trainer.placement_timeout={STARTING_S}",)
    return Job(
        name=_label(trainer.experiment_name),
        config=config,
        overrides=(*overrides, *waiting),
        machines=ceil(devices / trainer.n_gpus_per_node),
        devices=trainer.n_gpus_per_node,
        gpus=trainer.device != "cpu",
        lead_s=trainer.grace_seconds + LEAD_S,
        folder=trainer.default_local_dir,
    )


def warnings(loaded: Loaded) -> Iterator[str]:
    """Say what keeps a run from going on after it was pre-empted."""
    trainer = loaded.run.trainer
    again = "a run that is pre-empted begins again"
    if trainer.save_freq < 1:
        yield f"trainer.save_freq: no checkpoints are saved, so {again}; set it to the steps between checkpoints"
    if trainer.resume_mode == "disable":
        yield f"trainer.resume_mode: checkpoints are not resumed, so {again}; set it to auto"
    if not trainer.grace_seconds:
        yield "trainer.grace_seconds: SIGTERM ends the run at once, so the steps since the last checkpoint are lost"


def _label(text: str) -> str:
    """Return a name that Kubernetes accepts: up to 40 lowercase letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40].rstrip("-") or "iiverl"
