"""Trackers that write for another program: TensorBoard, Weights & Biases, MLflow, SwanLab.

Each imports its package when it is built, and nothing before.
"""

import re
import time
from collections.abc import Iterator, Mapping
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

TENSORBOARD_FOLDER = "tensorboard"


class TensorBoard:
    """Event files under `{folder}/tensorboard`, written by TensorBoard's own writer."""

    def __init__(self, folder: Path, project: str, experiment: str, config: Mapping[str, Any]) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        # By name, since protobuf makes these modules' classes at run time, where no type checker sees them.
        events = import_module("tensorboard.compat.proto.event_pb2")
        summaries = import_module("tensorboard.compat.proto.summary_pb2")
        self._event, self._session, self._summary = events.Event, events.SessionLog, summaries.Summary
        self._writer = EventFileWriter(str(folder / TENSORBOARD_FOLDER))
        self._started = False

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write one scalar a metric, and flush, so that a live view follows."""
        if not self._started:
            # Tells TensorBoard to drop what an earlier run wrote from this step on.
            start = self._session(status=self._session.START)
            self._writer.add_event(self._event(step=step, wall_time=time.time(), session_log=start))
            self._started = True
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._writer.add_event(
            self._event(step=step, wall_time=time.time(), summary=self._summary(value=values))
        )
        self._writer.flush()

    def close(self) -> None:
        """Write out what is left."""
        self._writer.close()


class Wandb:
    """A run of Weights & Biases; `wandb login`, `WANDB_MODE` and the like work as they always do."""

    def __init__(self, folder: Path, project: str, experiment: str, config: Mapping[str, Any]) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(project=project, name=experiment, config=dict(config), dir=str(folder))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log the step."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Send what is left and end the run."""
        self._run.finish()


class MLflow:
    """A run of MLflow in the experiment named by the project, where `MLFLOW_TRACKING_URI` says."""

    PARAMS_A_REQUEST = 100
    PARAM_LENGTH = 500

    def __init__(self, folder: Path, project: str, experiment: str, config: Mapping[str, Any]) -> None:
        import mlflow  # pyright: ignore[reportMissingImports]

        self._mlflow = mlflow
        mlflow.set_experiment(project)
        mlflow.start_run(run_name=experiment)
        params = ((key, str(value)[: self.PARAM_LENGTH]) for key, value in _flatten(config))
        while chunk := dict(islice(params, self.PARAMS_A_REQUEST)):
            mlflow.log_params(chunk)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log the step; MLflow takes no `@` in a name, and so `mean@4` becomes `mean_at_4`."""
        legal = {
            re.sub(r"[^\w\-. /]", "_", name.replace("@", "_at_")): value for name, value in metrics.items()
        }
        self._mlflow.log_metrics(legal, step=step)

    def close(self) -> None:
        """End the run."""
        self._mlflow.end_run()


class SwanLab:
    """An experiment of SwanLab; `swanlab login` and `SWANLAB_MODE` work as they always do."""

    def __init__(self, folder: Path, project: str, experiment: str, config: Mapping[str, Any]) -> None:
        import swanlab  # pyright: ignore[reportMissingImports]

        logs = folder / "swanlab"
        logs.mkdir(parents=True, exist_ok=True)
        self._swanlab = swanlab
        swanlab.init(project=project, experiment_name=experiment, config=dict(config), logdir=str(logs))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log the step."""
        self._swanlab.log(dict(metrics), step=step)

    def close(self) -> None:
        """Send what is left and end the experiment."""
        self._swanlab.finish()


def _flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
