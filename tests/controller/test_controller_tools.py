"""Runs with tools: the example's model calls functions, and what it wrote of a conversation is what is trained."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from iiverl_core.config import load
from iiverl_core.controller import train
from quickstart_fixtures import load_script

EXAMPLE = Path(__file__).parents[2] / "examples" / "calculator"
COMPUTE = {"add": int.__add__, "subtract": int.__sub__, "multiply": int.__mul__}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's data, and its model after few demonstrations, which calls functions in some responses."""
    folder = tmp_path_factory.mktemp("calculator")
    script = load_script(EXAMPLE / "make_inputs.py")
    script.make_data(folder)
    script.make_model(folder / "model", steps=100)
    return folder


@pytest.mark.slow
def test_calls_are_computed_and_only_right_answers_count(inputs: Path, tmp_path: Path) -> None:
    loaded = load(
        EXAMPLE / "calculator.yaml",
        [
            f"data.train_files={inputs}/train.jsonl",
            "data.val_files=null",
            f"actor_rollout_ref.model.path={inputs}/model",
            f"actor_rollout_ref.rollout.multi_turn.tools.path={EXAMPLE}/tools.py",
            f"custom_reward_function.path={EXAMPLE}/reward.py",
            f"trainer.default_local_dir={tmp_path}/run",
            f"trainer.rollout_data_dir={tmp_path}/run/samples",
            "trainer.runtime=local",
            "trainer.n_gpus_per_node=1",
            "trainer.total_training_steps=3",
            "trainer.test_freq=-1",
            "trainer.logger=[jsonl]",
        ],
    )
    train(loaded)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 3
    for record in records:
        assert 0 < record["rollout/tool_calls"] <= 1 and record["reward/failed"] == 0
        assert abs(record["rollout/kl"]) < 1e-9
    calls = 0
    for row in pq.read_table(tmp_path / "run" / "samples" / "3.parquet").to_pylist():
        messages = json.loads(row["messages"])
        written = [message for message in messages if message["role"] == "assistant"]
        assert sum(message["tokens"] for message in written) == row["response_length"]
        assert row["score"] == float(written[-1]["content"] == row["ground_truth"])
        called: dict[str, dict] = {}  # none if one of the response's calls was not valid JSON
        for message in messages:
            if message["role"] == "assistant":
                called = {call["id"]: call["function"] for call in message.get("tool_calls", ())}
            elif message.get("tool_call_id") in called and not message["content"].startswith("Error"):
                function = called[message["tool_call_id"]]
                arguments = function["arguments"]
                assert int(message["content"]) == COMPUTE[function["name"]](arguments["a"], arguments["b"])
                calls += 1
    assert calls > 10
