"""Trackers for TensorBoard, Weights & Biases, trackio, MLflow and SwanLab. Each imports its package when it is built."""

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

from iiverl_core.telemetry.generations import Generation, as_markdown
from iiverl_core.telemetry.trackers import TrackerSetup

GENERATIONS = "val/generations"
GENERATION_COLUMNS = ("step", "input", "output", "score", "failure", "ground_truth", "data_source", "row")
TENSORBOARD_FOLDER = "tensorboard"


class TensorBoard:
    """Event files under `{folder}/tensorboard`, written by TensorBoard's own writer."""

    def __init__(self, setup: TrackerSetup) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        # By name, since protobuf creates these classes at run time, where no type checker sees them.
        events = import_module("tensorboard.compat.proto.event_pb2")
        self._summaries = import_module("tensorboard.compat.proto.summary_pb2")
        self._event, self._session = events.Event, events.SessionLog
        self._writer = EventFileWriter(str(setup.folder / TENSORBOARD_FOLDER))
        self._started = False

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write one scalar per metric, and flush for live views."""
        value = self._summaries.Summary.Value
        self._write([value(tag=name, simple_value=number) for name, number in metrics.items()], step)

    def log_generations(self, rows: Sequence[Generation], step: int) -> None:
        """Write one text per response; the same row has the same tag at each step."""
        self._write([self._text(f"{GENERATIONS}/{row.name}", as_markdown(row)) for row in rows], step)

    def _text(self, tag: str, text: str) -> Any:
        tensors = import_module("tensorboard.compat.proto.tensor_pb2")
        string = import_module("tensorboard.compat.proto.types_pb2").DT_STRING
        plugin = self._summaries.SummaryMetadata.PluginData(plugin_name="text")
        kind = self._summaries.DATA_CLASS_TENSOR
        return self._summaries.Summary.Value(
            tag=tag,
            metadata=self._summaries.SummaryMetadata(plugin_data=plugin, data_class=kind),
            tensor=tensors.TensorProto(dtype=string, string_val=[text.encode()]),
        )

    def _write(self, values: list[Any], step: int) -> None:
        if not self._started:
            # TensorBoard drops an earlier run's values from this step on.
            start = self._session(status=self._session.START)
            self._writer.add_event(self._event(step=step, wall_time=time.time(), session_log=start))
            self._started = True
        summary = self._summaries.Summary(value=values)
        self._writer.add_event(self._event(step=step, wall_time=time.time(), summary=summary))
        self._writer.flush()

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class Wandb:
    """A run of Weights & Biases; `wandb login`, `WANDB_MODE` and the like work as usual."""

    def __init__(self, setup: TrackerSetup) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        setup.folder.mkdir(parents=True, exist_ok=True)
        self._wandb = wandb
        self._run = wandb.init(
            project=setup.project,
            name=setup.experiment,
            config=dict(setup.config),
            dir=str(setup.folder),
            **_continued(setup),
        )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log the step."""
        self._run.log(dict(metrics), step=step)

    def log_generations(self, rows: Sequence[Generation], step: int) -> None:
        """Log the responses of the step as a table."""
        table = self._wandb.Table(columns=list(GENERATION_COLUMNS), data=_table(rows, step))
        self._run.log({GENERATIONS: table}, step=step)

    def log_files(self, files: Mapping[str, Path]) -> None:
        """Save each file as an artifact, of its name as the type."""
        for name, path in files.items():
            artifact = self._wandb.Artifact(f"{name}-{self._run.id}", type=name)
            artifact.add_file(str(path))
            self._run.log_artifact(artifact)

    def close(self) -> None:
        """Send pending metrics and end the run."""
        self._run.finish()


class Trackio:
    """A run of trackio, in its folder (`TRACKIO_DIR`), or where `TRACKIO_SPACE_ID` and the like say."""

    def __init__(self, setup: TrackerSetup) -> None:
        import trackio  # pyright: ignore[reportMissingImports]

        self._trackio = trackio
        # Runs of trackio are continued by their name.
        name = f"{setup.experiment}-{setup.run_id[:8]}" if setup.run_id else setup.experiment
        self._run = trackio.init(
            project=setup.project,
            name=name,
            config=dict(setup.config),
            resume="allow" if setup.run_id else "never",
            embed=False,
        )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log the step."""
        self._run.log(dict(metrics), step=step)

    def log_generations(self, rows: Sequence[Generation], step: int) -> None:
        """Log the responses of the step as a table."""
        table = self._trackio.Table(columns=list(GENERATION_COLUMNS), data=_table(rows, step))
        self._run.log({GENERATIONS: table}, step=step)

    def log_files(self, files: Mapping[str, Path]) -> None:
        """Save each file as an artifact, of its name as the type."""
        for name, path in files.items():
            self._run.log_artifact(str(path), name=f"{self._run.name}-{name}", type=name)

    def close(self) -> None:
        """Write pending metrics and end the run."""
        self._run.finish()


class MLflow:
    """A run of MLflow at `MLFLOW_TRACKING_URI`, in the experiment named by the project."""

    PARAMS_PER_REQUEST = 100
    PARAM_LENGTH = 500
    RUN_ID = "iiverl.run_id"

    def __init__(self, setup: TrackerSetup) -> None:
        import mlflow  # pyright: ignore[reportMissingImports]

        self._mlflow = mlflow
        mlflow.set_experiment(setup.project)
        if setup.run_id and (known := self._known(setup)):
            mlflow.start_run(run_id=known)
            return  # parameters cannot be changed
        mlflow.start_run(
            run_name=setup.experiment, tags={self.RUN_ID: setup.run_id} if setup.run_id else None
        )
        params = ((key, str(value)[: self.PARAM_LENGTH]) for key, value in _flatten(setup.config))
        while chunk := dict(islice(params, self.PARAMS_PER_REQUEST)):
            mlflow.log_params(chunk)

    def _known(self, setup: TrackerSetup) -> str | None:
        """Find the run of MLflow that this run had before it was resumed."""
        found = self._mlflow.search_runs(
            experiment_names=[setup.project],
            filter_string=f"tags.`{self.RUN_ID}` = '{setup.run_id}'",
            output_format="list",
        )
        return found[0].info.run_id if found else None

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log the step; MLflow allows no `@` in names, so `mean@4` becomes `mean_at_4`."""
        legal = {
            re.sub(r"[^\w\-. /]", "_", name.replace("@", "_at_")): value for name, value in metrics.items()
        }
        self._mlflow.log_metrics(legal, step=step)

    def log_generations(self, rows: Sequence[Generation], step: int) -> None:
        """Save the responses as the artifact `generations/step_N.json`."""
        content = {"step": step, "generations": [asdict(row) for row in rows]}
        self._mlflow.log_dict(content, f"generations/step_{step}.json")

    def log_files(self, files: Mapping[str, Path]) -> None:
        """Save each file as an artifact in a folder of its name."""
        for name, path in files.items():
            self._mlflow.log_artifact(str(path), name)

    def close(self) -> None:
        """End the run."""
        self._mlflow.end_run()


class SwanLab:
    """An experiment of SwanLab; `swanlab login` and `SWANLAB_MODE` work as usual."""

    def __init__(self, setup: TrackerSetup) -> None:
        import swanlab  # pyright: ignore[reportMissingImports]

        logs = setup.folder / "swanlab"
        logs.mkdir(parents=True, exist_ok=True)
        self._swanlab = swanlab
        swanlab.init(
            project=setup.project,
            experiment_name=setup.experiment,
            config=dict(setup.config),
            logdir=str(logs),
            **_continued(setup),
        )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log the step."""
        self._swanlab.log(dict(metrics), step=step)

    def log_generations(self, rows: Sequence[Generation], step: int) -> None:
        """Log one text per response."""
        texts = [self._swanlab.Text(as_markdown(row), caption=f"{row.name}: {row.verdict}") for row in rows]
        self._swanlab.log({GENERATIONS: texts}, step=step)

    def close(self) -> None:
        """Send pending metrics and end the experiment."""
        self._swanlab.finish()


def _table(rows: Sequence[Generation], step: int) -> list[Any]:
    """Return the cells of a table with `GENERATION_COLUMNS`."""
    return [
        [step, r.prompt, r.response, r.score, r.failure, r.ground_truth, r.data_source, r.name] for r in rows
    ]


def _continued(setup: TrackerSetup) -> dict[str, Any]:
    """Give the arguments by which W&B and SwanLab continue the run of the same id, if there is one."""
    return {"id": setup.run_id, "resume": "allow"} if setup.run_id else {}


def _flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
