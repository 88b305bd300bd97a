"""Runs with an agent: the same bits twice, also if killed and resumed; failures are dropped and kept for inspection."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from controller.test_controller_resume import killed_at
from iiverl_core.config import Loaded, load
from iiverl_core.controller import train
from quickstart_fixtures import make_inputs

EXAMPLE = Path(__file__).parents[2] / "examples" / "openai_agent"
FAILING = '''
import sys
import openai


def agent(base_url, api_key, row):
    """Raise in some rollouts, and give each other one's response a reward."""
    sys.stdout.write("printed by the agent\\n")  # `print` writes a line's end by itself, and agents are threads
    sys.stderr.write("warned by the agent\\n")
    client = openai.OpenAI(base_url=base_url, api_key=api_key)
    response = client.chat.completions.create(model="policy", messages=row["prompt"])
    if row["seed"] % 4 == 0:
        raise LookupError("broken by plan")
    return float(len(response.choices[0].message.content))
'''


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's model and data."""
    return make_inputs(EXAMPLE, tmp_path_factory.mktemp("agent"))


@pytest.fixture
def asking(inputs: Path, tmp_path: Path) -> Callable[..., Loaded]:
    """Load a short run of the example in one process, which writes below `tmp_path`."""

    def make(*more: str, folder: str) -> Loaded:
        overrides = [
            f"data.train_files={inputs}/train.jsonl",
            "data.val_files=null",
            f"actor_rollout_ref.model.path={inputs}/model",
            f"actor_rollout_ref.rollout.multi_turn.agent.path={EXAMPLE}/agent.py",
            "actor_rollout_ref.rollout.multi_turn.agent.workers=3",
            "actor_rollout_ref.rollout.n=4",
            f"trainer.default_local_dir={tmp_path}/{folder}",
            f"trainer.rollout_data_dir={tmp_path}/{folder}/samples",
            "trainer.runtime=local",
            "trainer.n_gpus_per_node=1",
            "trainer.total_training_steps=3",
            "trainer.test_freq=-1",
            "trainer.logger=[jsonl]",
        ]
        return load(EXAMPLE / "openai_agent.yaml", [*overrides, *more])

    return make


def records(loaded: Loaded) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (loaded.run.folder / "metrics.jsonl").read_text().splitlines()]


def samples(loaded: Loaded, step: int) -> list[dict[str, Any]]:
    return pq.read_table(loaded.run.folder / "samples" / f"{step}.parquet").to_pylist()


@pytest.mark.slow
def test_runs_have_the_same_bits_also_if_killed_and_resumed(asking, differences, monkeypatch) -> None:
    saving = ("trainer.save_freq=1", "trainer.resume_mode=auto")
    whole, again, killed = (asking(*saving, folder=name) for name in ("whole", "again", "killed"))
    train(whole)
    train(again)
    assert differences(whole.run.folder, again.run.folder, 3) == []
    killed_at(3, monkeypatch, killed)
    train(killed)
    assert differences(whole.run.folder, killed.run.folder, 3) == []
    for record in records(whole):
        assert 1 < record["rollout/turns"] <= 3 and record["reward/failed"] == 0
    for row in samples(whole, 3):
        written = [message for message in json.loads(row["messages"]) if message["role"] == "assistant"]
        assert sum(message["tokens"] for message in written) == row["response_length"]


@pytest.mark.slow
def test_failed_rollouts_have_a_traceback_and_agents_print_elsewhere(asking, tmp_path, capfd) -> None:
    path = tmp_path / "failing.py"
    path.write_text(FAILING)
    agent = f"actor_rollout_ref.rollout.multi_turn.agent.path={path}"
    loaded = asking(
        agent, "reward_api.max_failed_fraction=0.9", "trainer.total_training_steps=2", folder="failing"
    )
    train(loaded)
    rows = [row for step in (1, 2) for row in samples(loaded, step)]
    broken = [row for row in rows if row["outcome"] == "environment"]
    assert 0 < len(broken) < len(rows) == 32
    assert sum(record["rollout/env_failures"] for record in records(loaded)) == len(broken)
    for row in broken:
        assert row["score"] is None and row["advantage"] is None
        assert 'in agent: raise LookupError("broken by plan")\nLookupError' in row["failure_detail"]
        assert json.loads(row["messages"])[-1]["role"] == "assistant"
    for row in rows:
        if row["outcome"] != "environment":
            assert row["score"] == len(json.loads(row["messages"])[-1]["content"])
    output = (loaded.run.folder / "agent.log").read_text()
    assert output.count("printed by the agent\n") == output.count("warned by the agent\n") == 32
    captured = capfd.readouterr()
    assert "by the agent" not in captured.out + captured.err
