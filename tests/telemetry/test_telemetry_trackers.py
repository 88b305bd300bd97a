import json
import logging
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from iiverl_core.errors import ConfigError, IIVerlError
from iiverl_core.registry import TRACKERS
from iiverl_core.telemetry.generations import Generation
from iiverl_core.telemetry.trackers import Trackers, make_trackers, number

CONFIG = {"trainer": {"nnodes": 1, "logger": ["wandb"]}, "data": {"seed": 1}}


class Recorder(ModuleType):
    """Stands for a package that is not installed: keeps every call as (name, args, kwargs)."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, args, kwargs))
            return self

        return call


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str) -> Recorder:
    recorder = Recorder(name)
    monkeypatch.setitem(sys.modules, name, recorder)
    return recorder


def make(names: list[str], folder: Path, **options: Any) -> Any:
    return make_trackers(names, folder, "project", "experiment", CONFIG, **options)


STEP = {
    "actor/lr": 1e-6,
    "critic/score/mean": 0.412345,
    "critic/score/max": 1.0,
    "actor/ppo_kl": 0.0000123456,
    "actor/entropy_loss": 1.23456,
    "actor/pg_clipfrac": 0.0123456,
    "actor/grad_norm": 0.531,
    "response_length/mean": 1234.5678,
    "timing_s/step": 32.5,
    "perf/total_num_tokens": 149226,
    "perf/throughput": 574.0,
}


@pytest.fixture
def columns(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the width of the terminal; without a call there is none."""
    monkeypatch.delenv("COLUMNS", raising=False)
    return lambda width: monkeypatch.setenv("COLUMNS", str(width))


def console_lines(folder: Path, metrics: Mapping[str, float], step: int = 7) -> list[str]:
    said: list[str] = []
    make(["console"], folder, log=said.append).log(metrics, step)
    return "\n".join(said).splitlines()


def test_console_shows_the_key_figures_of_a_step(tmp_path: Path, columns: Any):
    assert console_lines(tmp_path, STEP) == [
        "step 7  reward 0.412  kl 1.23e-05  length 1.23e+03  grad 0.531  entropy 1.23  clip 0.0123  32.5 s  4.6k tok/s"
    ]


def test_console_shows_how_many_steps_there_are(tmp_path: Path, columns: Any):
    lines: list[str] = []
    make(["console"], tmp_path, log=lines.append, total_steps=9).log(STEP | {"val/test_score/echo": 0.5}, 7)
    assert [line.split("  ")[0] for line in lines] == ["step 7/9", "step 7/9"]


def test_the_file_has_what_the_console_leaves_out(tmp_path: Path):
    tracker = make(["console", "jsonl"], tmp_path, log=lambda line: None)
    tracker.log(STEP, 7)
    tracker.close()
    assert STEP.items() <= json.loads((tmp_path / "metrics.jsonl").read_text()).items()


@pytest.mark.parametrize("width", [40, 60, 80, 100])
def test_the_console_s_line_fits_the_terminal(tmp_path: Path, columns: Any, width: int):
    columns(width)
    many = {f"reward/component_{i}/mean": float(i) for i in range(100)}
    worst = dict.fromkeys(STEP, -0.000123456789) | {"timing_s/step": 86399.0, "perf/total_num_tokens": 1e12}
    for metrics in (STEP, STEP | many, worst | many):
        (line,) = console_lines(tmp_path, metrics, step=123456)
        assert len(line) <= width
        assert line.startswith("step 123456  reward ")


def test_console_shows_a_kl_in_the_loss_or_in_the_reward_before_that_of_an_update(
    tmp_path: Path, columns: Any
):
    assert "kl 0.5" in console_lines(tmp_path, STEP | {"critic/kl": 0.5})[0]
    assert "kl 0.25" in console_lines(tmp_path, STEP | {"critic/kl": 0.5, "actor/kl_loss": 0.25})[0]


def test_console_shows_validations_whole(tmp_path: Path, columns: Any):
    scores = {f"val/test_score/hub/data-set-{i}": i / 10 for i in range(10)}
    metrics = {"val/failed": 0.0, **scores, "val/test_score/hub/data-set-0/mean@4": 0.1}
    lines = console_lines(tmp_path, metrics, step=0)
    assert max(map(len, lines)) <= 120
    assert " ".join(" ".join(lines).split()) == "step 0 validation " + " ".join(
        f"hub/data-set-{i} {number(i / 10)}" for i in range(10)
    )
    both = console_lines(tmp_path, STEP | {"val/test_score/echo": 0.5})
    assert [line.split("  ")[:2] for line in both] == [["step 7", "reward 0.412"], ["step 7", "validation"]]


def test_console_is_silent_without_key_figures(tmp_path: Path):
    assert console_lines(tmp_path, {"a": 1.0}) == []


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, "3"),
        (3.0, "3.0"),
        (-0.5, "-0.5"),
        (12.3456, "12.35"),
        (12345.678, "12345.7"),
        (149226491215872.0, "149226491215872.0"),
        (1e20, "1e+20"),
        (0.00012346, "0.0001235"),
        (math.inf, "inf"),
    ],
)
def test_numbers(value: float, text: str):
    assert number(value) == text


@given(st.floats(-1e300, 1e300))
def test_a_number_can_be_read_back_to_four_digits(value: float):
    assert float(number(value)) == pytest.approx(value, rel=5.1e-4)


def test_several_trackers_get_the_same_and_numpy_numbers_are_plain(tmp_path: Path):
    lines: list[str] = []
    tracker = make(["console", "jsonl", "console"], tmp_path, log=lines.append)
    tracker.log({"critic/score/mean": np.float32(0.5)}, 1)
    tracker.close()
    assert lines == ["step 1  reward 0.5"]
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["critic/score/mean"] == 0.5


def test_tensorboard_reads_what_was_written_and_a_resumed_run_replaces(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, value in ((1, 1.0), (3, 2.0)):
        tracker = make(["tensorboard"], tmp_path)
        for step in range(first, 5):
            tracker.log({"critic/score/mean": value}, step)
        tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    scalars = [(event.step, event.value) for event in events.Scalars("critic/score/mean")]
    assert scalars == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]


def test_wandb_is_given_names_config_and_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wandb = stand_in(monkeypatch, "wandb")
    folder = tmp_path / "run"
    tracker = make(["wandb"], folder)
    tracker.log({"a": 0.5}, 3)
    tracker.close()
    assert wandb.calls == [
        ("init", (), {"project": "project", "name": "experiment", "config": CONFIG, "dir": str(folder)}),
        ("log", ({"a": 0.5},), {"step": 3}),
        ("finish", (), {}),
    ]
    assert folder.is_dir()


def test_mlflow_is_given_flat_params_in_requests_that_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    mlflow = stand_in(monkeypatch, "mlflow")
    config = {"a": {"b": {str(i): i for i in range(130)}}, "long": "x" * 9000}
    tracker = make_trackers(["mlflow"], tmp_path, "project", "experiment", config)
    tracker.log({"val/test_score/org/set/mean@4": 0.5, "odd:name": 1.0}, 3)
    tracker.close()
    assert mlflow.calls[:2] == [
        ("set_experiment", ("project",), {}),
        ("start_run", (), {"run_name": "experiment", "tags": None}),
    ]
    requests = [args[0] for name, args, _ in mlflow.calls if name == "log_params"]
    assert [len(request) for request in requests] == [100, 31]
    assert requests[0]["a.b.99"] == "99"
    assert len(requests[1]["long"]) == 500
    assert mlflow.calls[-2:] == [
        ("log_metrics", ({"val/test_score/org/set/mean_at_4": 0.5, "odd_name": 1.0},), {"step": 3}),
        ("end_run", (), {}),
    ]


def test_swanlab_is_given_names_config_and_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    swanlab = stand_in(monkeypatch, "swanlab")
    tracker = make(["swanlab"], tmp_path)
    tracker.log({"a": 0.5}, 3)
    tracker.close()
    logs = str(tmp_path / "swanlab")
    assert swanlab.calls == [
        (
            "init",
            (),
            {"project": "project", "experiment_name": "experiment", "config": CONFIG, "logdir": logs},
        ),
        ("log", ({"a": 0.5},), {"step": 3}),
        ("finish", (), {}),
    ]


def log_twice(name: str, folder: Path) -> None:
    """Log two steps of a run that is resumed between them, responses, and a file."""
    report = folder / "report.html"
    report.write_text("<p>report")
    row = Generation("val.jsonl", 12, 0, "org/set", "What is 8·9?", "It is 72.", 1.0, None, "72")
    for step in (3, 4):
        tracker = make([name], folder, run_id="7c1e")
        tracker.log({"critic/score/mean": step / 8, "val/test_score/org/set/mean@4": 0.5}, step)
        tracker.log_generations([row], step)
        assert tracker.keeps_files
        tracker.log_files({"report": report, "samples": folder / "none.parquet"})
        tracker.close()


def test_trackio_keeps_a_run_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # is read when it is imported
    for name in [name for name in sys.modules if name.split(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)
    storage = pytest.importorskip("trackio").SQLiteStorage
    log_twice("trackio", tmp_path)
    assert not [each for each in caplog.records if each.name.startswith("iiverl")]
    assert (tmp_path / "trackio" / "project.db").is_file()
    assert storage.get_runs("project") == ["experiment-7c1e"]
    logged = [each for each in storage.get_logs("project", "experiment-7c1e") if "critic/score/mean" in each]
    assert [(each["step"], each["critic/score/mean"]) for each in logged] == [(3, 0.375), (4, 0.5)]
    assert storage.get_run_config("project", "experiment-7c1e")["data"] == {"seed": 1}
    blobs = [each.read_text() for each in (tmp_path / "trackio" / "artifacts").rglob("*") if each.is_file()]
    assert "<p>report" in blobs


def test_mlflow_keeps_a_run_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow = pytest.importorskip("mlflow")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    log_twice("mlflow", tmp_path)
    assert not [each for each in caplog.records if each.name.startswith("iiverl")]
    (run,) = mlflow.search_runs(experiment_names=["project"], output_format="list")
    client = mlflow.MlflowClient()
    history = client.get_metric_history(run.info.run_id, "critic/score/mean")
    assert [(each.step, each.value) for each in history] == [(3, 0.375), (4, 0.5)]
    assert run.data.params["data.seed"] == "1" and "val/test_score/org/set/mean_at_4" in run.data.metrics
    assert [each.path for each in client.list_artifacts(run.info.run_id)] == ["generations", "report"]


def test_wandb_keeps_a_run_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log_twice("wandb", tmp_path)
    assert not [each for each in caplog.records if each.name.startswith("iiverl")]
    written = sorted((tmp_path / "wandb").glob("offline-run-*-7c1e/run-7c1e.wandb"))
    assert b"critic/score/mean" in b"".join(file.read_bytes() for file in written)
    (table, *_) = (tmp_path / "wandb").glob("offline-run-*/files/media/table/val/generations_*.json")
    assert json.loads(table.read_text())["data"][0][1:4] == ["What is 8·9?", "It is 72.", 1.0]


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_a_service_continues_the_run_of_the_same_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    service = stand_in(monkeypatch, name)
    make([name], tmp_path, run_id="7c1e").close()
    _, _, options = service.calls[0]
    assert (options["id"], options["resume"]) == ("7c1e", "allow")


@pytest.mark.parametrize("known", [None, "31f0"])
def test_mlflow_continues_the_run_that_has_the_id_as_a_tag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: str | None
):
    mlflow = stand_in(monkeypatch, "mlflow")
    found = [SimpleNamespace(info=SimpleNamespace(run_id=known))] if known else []
    searches: list[dict[str, Any]] = []
    mlflow.search_runs = lambda **options: searches.append(options) or found
    make(["mlflow"], tmp_path, run_id="7c1e").close()
    assert searches[0]["filter_string"] == "tags.`iiverl.run_id` = '7c1e'"
    started = next(options for name, _, options in mlflow.calls if name == "start_run")
    tagged = {"run_name": "experiment", "tags": {"iiverl.run_id": "7c1e"}}
    assert started == ({"run_id": known} if known else tagged)
    assert any(name == "log_params" for name, *_ in mlflow.calls) == (known is None)


@pytest.mark.parametrize("name", ["wandb", "mlflow", "swanlab"])
def test_a_package_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setitem(sys.modules, name, None)  # importing it fails as if it were not there
    with pytest.raises(IIVerlError, match=rf"trainer\.logger lists {name}.*\n.*uv pip install {name}"):
        make(["console", name], tmp_path)


def test_a_tracker_that_cannot_start_closes_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    swanlab = stand_in(monkeypatch, "swanlab")

    def refuse(**_: Any) -> None:
        raise RuntimeError("no API key")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=refuse))
    with pytest.raises(IIVerlError, match=r"wandb could not start \(RuntimeError: no API key\)") as caught:
        make(["swanlab", "wandb"], tmp_path)
    assert not isinstance(caught.value, ConfigError)
    assert swanlab.calls[-1][0] == "finish"


def test_a_name_that_is_none(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"unknown tracker 'wanb'.*" + ".*".join(TRACKERS)):
        make(["wanb"], tmp_path)


class Broken:
    def __init__(self) -> None:
        self.tried: list[int] = []

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.tried.append(step)
        raise ConnectionError("network is down")

    def log_generations(self, rows: Any, step: int) -> None:
        raise ConnectionError("network is down")

    def close(self) -> None:
        raise ConnectionError("network is down")


def test_a_tracker_that_fails_is_reported_once_and_the_others_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    broken, rest = Broken(), make(["jsonl"], tmp_path)
    tracker = Trackers({"wandb": broken, "jsonl": rest})
    with caplog.at_level(logging.WARNING):
        for step in (1, 2):
            tracker.log({"a": 1.0}, step)
        tracker.close()
    (record,) = caplog.records
    assert "tracker wandb could not log step 1 (ConnectionError: network is down)" in record.getMessage()
    assert broken.tried == [1, 2]  # the network may be back
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_an_interrupt_is_not_swallowed(tmp_path: Path):
    def log(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(["console"], tmp_path, log=log).log(STEP, 1)


def test_importing_telemetry_brings_in_nothing_heavy():
    heavy = ("torch", "ray", "tensorboard", "wandb", "matplotlib", "plotext", "pandas")
    program = f"import iiverl_core.telemetry, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
