"""Which responses of a validation are shown, and how each tracker shows them."""

import json
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from iiverl_core.samples import Rollout
from iiverl_core.telemetry import Generation, make_trackers, pick
from iiverl_core.telemetry.generations import as_lines, as_markdown
from iiverl_core.telemetry.trackers import Trackers
from iiverl_reward_client import Failed, Scored

GOOD = Generation("val.jsonl", 12, 0, "org/set", "What is 8·9?", "It is 72.\n# done", 1.0, None, "72")
BAD = Generation("val.jsonl", 3, 1, "", "a\nb", "", None, "timeout: no answer in 5 s", None)


@pytest.fixture
def samples(make_sample: Callable[..., Rollout]) -> list[Rollout]:
    """Two responses to each of fifty prompts, rows 10 to 59."""
    return [
        make_sample(group, member, outcome=Scored(float(member)), text=f"{group}.{member}")
        for group in range(50)
        for member in range(2)
    ]


def shown(rows: Sequence[Generation]) -> list[tuple[int, int]]:
    return [(row.row, row.member) for row in rows]


def test_the_same_prompts_are_picked_each_time_whatever_the_order(samples: list[Rollout]) -> None:
    picked = pick(samples, 8)
    assert shown(picked) == sorted(shown(picked))
    assert {member for _, member in shown(picked)} == {0}
    later = [replace(sample, text="better", weights_version=9) for sample in reversed(samples)]
    assert shown(pick(later, 8)) == shown(picked)
    assert {row.response for row in pick(later, 8)} == {"better"}


def test_more_adds_to_fewer_and_they_are_spread(samples: list[Rollout]) -> None:
    assert set(shown(pick(samples, 4))) < set(shown(pick(samples, 8)))
    rows = [row for row, _ in shown(pick(samples, 12))]
    assert min(rows) < 25 and max(rows) > 45
    assert shown(pick(samples, 8, seed=1)) != shown(pick(samples, 8))


def test_second_responses_come_when_every_prompt_has_one(samples: list[Rollout]) -> None:
    members = [member for _, member in shown(pick(samples, 53))]
    assert (members.count(0), members.count(1)) == (50, 3)
    assert len(pick(samples, 1000)) == 100
    assert pick(samples, 0) == pick([], 3) == []


def test_a_sample_becomes_what_is_shown(make_sample: Callable[..., Rollout]) -> None:
    good = make_sample(outcome=Scored(0.5), ground_truth={"answer": 7}, text="half \ud800")
    failed = make_sample(1, outcome=Failed("timeout", detail="no answer\nin 5 s"))
    unscored = make_sample(2)
    first, second, third = pick([good, failed, unscored], 3)
    assert first == Generation(
        "rows.jsonl", 10, 0, "org/set", "a question", "half ?", 0.5, None, '{"answer": 7}'
    )
    assert (second.score, second.failure) == (None, "timeout: no answer\nin 5 s")
    assert [row.verdict for row in (first, second, third)] == [
        "score 0.5",
        "timeout: no answer in 5 s",
        "not scored",
    ]


def test_markdown_takes_nothing_in_a_text_for_markdown() -> None:
    assert as_markdown(GOOD) == (
        "org/set · val.jsonl, row 12 · **score 1**\n\n**prompt**\n\n    What is 8·9?\n\n"
        "**response**\n\n    It is 72.\n    # done\n\n**ground truth**\n\n    72"
    )
    assert as_markdown(BAD).startswith(
        "val.jsonl, row 3, response 2 · **timeout: no answer in 5 s**\n\n**prompt**\n\n    a\n    b\n"
    )


def test_lines_are_cut_in_the_middle() -> None:
    assert as_lines(GOOD) == [
        "  org/set, val.jsonl, row 12: score 1",
        "    prompt    What is 8·9?",
        "    response  It is 72. # done",
        "    truth     72",
    ]
    long = as_lines(replace(GOOD, prompt="begin " + "x " * 5000 + "end"), width=40)[1]
    assert len(long) <= 14 + 40
    assert long.startswith("    prompt    begin x") and " … " in long and long.endswith("x end")


def make(names: list[str], folder: Path, **options: Any) -> Any:
    return make_trackers(names, folder, "project", "experiment", {}, **options)


class StandIn(ModuleType):
    """Stands for a package that is not installed: keeps every call as (name, args, kwargs)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        monkeypatch.setitem(sys.modules, name, self)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, args, kwargs))
            return (name, args, kwargs) if name in ("Table", "Text") else self

        return call


def test_console_and_file(tmp_path: Path) -> None:
    said: list[str] = []
    tracker = make(["console", "jsonl"], tmp_path, log=said.append)
    tracker.log({"critic/score/mean": 1.0}, 5)
    assert not (tmp_path / "generations.jsonl").exists()
    tracker.log_generations([GOOD, BAD], 5)
    tracker.log_generations([GOOD], 10)
    tracker.close()
    assert said[1].splitlines() == ["responses at step 5:", *as_lines(GOOD), *as_lines(BAD)]
    lines = [json.loads(line) for line in (tmp_path / "generations.jsonl").read_text().splitlines()]
    assert lines == [{"step": 5, **asdict(GOOD)}, {"step": 5, **asdict(BAD)}, {"step": 10, **asdict(GOOD)}]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_killed_run_s_half_line_does_not_swallow_the_next(tmp_path: Path) -> None:
    (tmp_path / "generations.jsonl").write_text('{"step": 1, "pro')
    make(["jsonl"], tmp_path).log_generations([GOOD], 2)
    lines = (tmp_path / "generations.jsonl").read_text().splitlines()
    assert json.loads(lines[1]) == {"step": 2, **asdict(GOOD)}


def test_tensorboard_has_a_text_for_each_row_over_the_steps(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = make(["tensorboard"], tmp_path)
    for step in (5, 10):
        tracker.log_generations([replace(GOOD, response=f"at {step}"), BAD], step)
        tracker.log({"val/test_score/org/set": 0.5}, step)
    tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["tensors"] == [
        "val/generations/val.jsonl, row 12",
        "val/generations/val.jsonl, row 3, response 2",
    ]
    texts = [
        (event.step, event.tensor_proto.string_val[0].decode())
        for event in events.Tensors("val/generations/val.jsonl, row 12")
    ]
    assert texts == [(step, as_markdown(replace(GOOD, response=f"at {step}"))) for step in (5, 10)]
    metadata = events.SummaryMetadata("val/generations/val.jsonl, row 12")
    assert metadata.plugin_data.plugin_name == "text"
    assert [event.step for event in events.Scalars("val/test_score/org/set")] == [5, 10]


def test_wandb_has_a_table_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = StandIn(monkeypatch, "wandb")
    make(["wandb"], tmp_path).log_generations([GOOD, BAD], 5)
    table, log = wandb.calls[1:]
    assert table[0] == "Table"
    assert table[2]["columns"][:4] == ["step", "input", "output", "score"]
    assert [row[:5] for row in table[2]["data"]] == [
        [5, "What is 8·9?", "It is 72.\n# done", 1.0, None],
        [5, "a\nb", "", None, "timeout: no answer in 5 s"],
    ]
    assert all(len(row) == len(table[2]["columns"]) for row in table[2]["data"])
    assert log == ("log", ({"val/generations": table},), {"step": 5})


def test_mlflow_has_an_artifact_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = StandIn(monkeypatch, "mlflow")
    make(["mlflow"], tmp_path).log_generations([GOOD], 5)
    content = {"step": 5, "generations": [asdict(GOOD)]}
    assert mlflow.calls[-1] == ("log_dict", (content, "generations/step_5.json"), {})


def test_swanlab_has_a_text_a_response(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swanlab = StandIn(monkeypatch, "swanlab")
    make(["swanlab"], tmp_path).log_generations([GOOD, BAD], 5)
    texts = [
        ("Text", (as_markdown(GOOD),), {"caption": "val.jsonl, row 12: score 1"}),
        ("Text", (as_markdown(BAD),), {"caption": "val.jsonl, row 3, response 2: timeout: no answer in 5 s"}),
    ]
    assert swanlab.calls[-1] == ("log", ({"val/generations": texts},), {"step": 5})


class Broken:
    """Takes metrics once, and then nothing more."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def log(self, metrics: Any, step: int) -> None:
        self.steps.append(step)
        if step > 1:
            raise ConnectionError("network is down")

    def log_generations(self, rows: Any, step: int) -> None:
        raise TypeError("too long")

    def close(self) -> None:
        pass


def test_a_tracker_that_takes_no_responses_is_reported_once_and_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = Broken()
    tracker = Trackers({"wandb": broken, "jsonl": make(["jsonl"], tmp_path)})
    with caplog.at_level(logging.WARNING):
        for step in (1, 2, 3):
            tracker.log_generations([GOOD], step)
            tracker.log({"a": 1.0}, step)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2
    assert "tracker wandb could not log the responses of step 1 (TypeError: too long)" in told[0]
    assert "tracker wandb could not log step 2 (ConnectionError" in told[1]  # not hidden by the first
    assert broken.steps == [1, 2, 3]
    assert len((tmp_path / "generations.jsonl").read_text().splitlines()) == 3
