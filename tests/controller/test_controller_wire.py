"""What workers are sent in a step: references and lengths, never text or columns."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from controller.test_controller_ppo import REWARD_MODEL, random_reward_model, reward
from iiverl_core.cluster import local
from iiverl_core.cluster.messages import RankBatch
from iiverl_core.config import Loaded
from iiverl_core.controller import train
from iiverl_core.rollout import RolloutRequest
from iiverl_core.samples import SequenceRef

PROMPT = "abcdefghijklmnopqrstuvwxyzabcdefghijklmnopqrst"  # 46 of the model's 64 tokens
COLUMN = "a column of this row, " * 1000
KILOBYTE = 1000


@dataclass(frozen=True)
class Reference:
    """As large as a pickled reference of Ray: an id, and the address of the owner."""

    id: bytes = field(default_factory=lambda: os.urandom(250))


class ReferringStore:
    """A store that is not in the references, as the runtime without Ray has it."""

    def __init__(self) -> None:
        self.values: dict[Reference, Any] = {}

    def put(self, value: Any) -> Reference:
        self.values[reference := Reference()] = value
        return reference

    def get(self, references: Sequence[Reference]) -> list[Any]:
        return [self.values[reference] for reference in references]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """The name and the arguments of each call that a worker gets."""
    made: list[tuple[str, Any]] = []
    monkeypatch.setattr(local, "LocalStore", ReferringStore)
    for name in ("run", "stream"):
        original = getattr(local.LocalGroup, name)

        def noted(
            self, method: Callable[..., Any], arguments: Sequence[Any], original=original
        ) -> Any | Iterator[Any]:
            made.extend((method.__name__, each) for each in arguments)
            return original(self, method, arguments)

        monkeypatch.setattr(local.LocalGroup, name, noted)
    run_on = local.LocalGroup.run_on

    def noted_on(self, rank: int, method: Callable[..., Any], *arguments: Any) -> Any:
        made.append((method.__name__, arguments))
        return run_on(self, rank, method, *arguments)

    monkeypatch.setattr(local.LocalGroup, "run_on", noted_on)
    return made


def parts_of(arguments: Any) -> list[SequenceRef | RolloutRequest]:
    """The sequences and requests that a call is about."""
    if isinstance(arguments, SequenceRef | RolloutRequest):
        return [arguments]
    if isinstance(arguments, RankBatch):
        return list(arguments.sequences)
    if isinstance(arguments, list | tuple):
        return [part for each in arguments for part in parts_of(each)]
    return []


def test_workers_get_less_than_a_kilobyte_per_sample_and_no_text(
    quickstart: Callable[..., Loaded], quickstart_inputs: Path, tmp_path: Path, calls: list[tuple[str, Any]]
) -> None:
    rows = [
        {"prompt": PROMPT[i:] + PROMPT[:i], "data_source": "echo", "ground_truth": "abc", "notes": COLUMN}
        for i in range(8)
    ]
    data = tmp_path / "long.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    folder = random_reward_model(quickstart_inputs, tmp_path / "rm")
    train(
        quickstart(
            f"data.train_files={data}",
            f"data.val_files={data}",
            "data.max_prompt_length=48",
            "algorithm.adv_estimator=gae",
            "algorithm.use_kl_in_reward=true",
            f"critic.model.path={quickstart_inputs}/model",
            "critic.model.enable_gradient_checkpointing=false",
            "critic.model.fsdp_config.mixed_precision={param_dtype: fp32}",
            "actor_rollout_ref.actor.use_kl_loss=true",
            "actor_rollout_ref.actor.policy_loss.loss_mode=kl_cov",
            *REWARD_MODEL,
            f"reward_model.model.path={folder}",
            f"reward_model.model.input_tokenizer={quickstart_inputs}/model",
            "trainer.total_training_steps=1",
            "trainer.val_before_train=true",
            reward(tmp_path, "return len(solution_str)"),
        )
    )
    methods = {
        "generate", "score", "evaluate", "advantages", "select_tokens", "update", "update_rollout_weights",
        "weight_digests", "sleep", "release_cache", "memory", "write_sequences",
    }  # fmt: skip
    names = [name for name, _ in calls]
    assert set(names) == methods
    assert names[0] == "sleep"  # an engine's cache would be in the way of the first update
    for name, arguments in calls:
        wire = cloudpickle.dumps(arguments)
        parts = parts_of(arguments)
        if name == "generate":  # an engine reads token ids, and nothing else of a prompt
            allowed = sum(KILOBYTE + 8 * len(question.prompt.ids) for question in parts)
        else:
            allowed = KILOBYTE * max(len(parts), 1)
        assert len(wire) < allowed, f"{name}: {len(wire)} bytes for {len(parts)} samples"
        # Pickle writes the length before a name: `Rollout`, not `RolloutRequest`.
        for text in (PROMPT[:10], COLUMN[:10], "\x07Rollout", "Outcome", "Scored"):
            assert text.encode() not in wire, f"{name} is sent {text!r}"
    assert {len(parts_of(arguments)) for name, arguments in calls if name == "update"} == {16}
