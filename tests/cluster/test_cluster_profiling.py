"""Traces of the steps and the processes that were chosen, and of no others."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from iiverl_core.cluster.profiling import StepProfiler
from iiverl_core.config import Loaded, ProfileConfig
from iiverl_core.controller import train

PROFILER = "actor_rollout_ref.actor.profiler"


def events(file: Path) -> list[dict]:
    return json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]


@pytest.mark.slow
def test_the_chosen_steps_are_traced(quickstart: Callable[..., Loaded], tmp_path: Path) -> None:
    folder = tmp_path / "traces"
    train(
        quickstart(
            "global_profiler.tool=torch",
            "global_profiler.steps=[2]",
            f"global_profiler.save_path={folder}",
            f"{PROFILER}.enable=true",
            f"{PROFILER}.tool_config.torch.contents=[cpu, shapes]",
            "actor_rollout_ref.actor.use_kl_loss=true",
        )
    )
    assert [file.name for file in folder.iterdir()] == ["step_2.rank_0.json.gz"]
    found = events(folder / "step_2.rank_0.json.gz")
    spans = [event for event in found if event.get("cat") == "user_annotation"]
    names = {event["name"] for event in spans}
    assert {
        "generate",
        "evaluate reference",
        "update actor",
        "update rollout weights",
    } <= names
    update = next(event for event in spans if event["name"] == "update actor")
    within = {
        event["name"]
        for event in found
        if event.get("cat") == "cpu_op" and update["ts"] <= event["ts"] <= update["ts"] + update["dur"]
    }
    assert {"aten::mm", "aten::embedding"} <= within


def test_the_processes_are_those_that_were_chosen(tmp_path: Path) -> None:
    def traced(config: ProfileConfig | None, rank: int) -> Path | None:
        profiler = StepProfiler(config, rank)
        profiler.begin(7)
        with profiler.span("span"):
            pass
        return profiler.end()

    some = ProfileConfig(frozenset({7}), frozenset({1}), frozenset({"cpu"}), tmp_path)
    every = ProfileConfig(frozenset({7}), None, frozenset({"cpu"}), tmp_path)
    assert traced(None, 0) is None
    assert traced(some, 0) is None
    assert traced(some, 1) == tmp_path / "step_7.rank_1.json.gz"
    assert traced(every, 3) == tmp_path / "step_7.rank_3.json.gz"
    assert any(event.get("name") == "span" for event in events(tmp_path / "step_7.rank_3.json.gz"))
