"""The trackers, which log the metrics of a run.

Packages add theirs under the entry-point group `iiverl.trackers`.
"""

import importlib.util
from dataclasses import dataclass

from iiverl_core.installation import install_command
from iiverl_core.registry.registry import Info, Registry

GROUP = "iiverl.trackers"


@dataclass(frozen=True, kw_only=True)
class TrackerInfo(Info):
    """A tracker: `code` is a function (or class) of a `TrackerSetup` that returns a `Tracker`.

    `package` is a required package that has a module of the same name.
    """

    package: str | None = None

    def missing(self) -> str | None:
        """See `Info.missing`."""
        if self.package is None or importlib.util.find_spec(self.package):
            return None
        return f"{self.package} is not installed; install with: {install_command(self.package)}"


TRACKERS = Registry(
    "tracker",
    GROUP,
    TrackerInfo,
    (
        TrackerInfo(
            name="console",
            summary="one line per step on the terminal",
            code="iiverl_core.telemetry.trackers:console_tracker",
        ),
        TrackerInfo(
            name="tensorboard",
            summary="event files in the run's folder",
            code="iiverl_core.telemetry.services:TensorBoard",
        ),
        TrackerInfo(
            name="jsonl",
            summary="metrics.jsonl in the run's folder, one line per step",
            code="iiverl_core.telemetry.trackers:jsonl_tracker",
        ),
        TrackerInfo(
            name="wandb",
            summary="Weights & Biases",
            code="iiverl_core.telemetry.services:Wandb",
            package="wandb",
        ),
        TrackerInfo(
            name="trackio",
            summary="trackio, in a folder of this machine or on the Hugging Face Hub",
            code="iiverl_core.telemetry.services:Trackio",
            package="trackio",
        ),
        TrackerInfo(
            name="mlflow",
            summary="MLflow",
            code="iiverl_core.telemetry.services:MLflow",
            package="mlflow",
        ),
        TrackerInfo(
            name="swanlab",
            summary="SwanLab",
            code="iiverl_core.telemetry.services:SwanLab",
            package="swanlab",
        ),
    ),
)
