"""What differs between a checkpoint's run and the one that resumes it, and what that means."""

import re
from pathlib import Path
from typing import Any

import pytest

from iiverl_core.checkpoints import (
    compare_config,
    compare_dataset,
    compare_versions,
    forbidden,
    missing_contents,
    versions,
)
from iiverl_core.checkpoints.compare import EFFECTS, effect_of
from iiverl_core.config import Config, load
from iiverl_core.config.schema import keys

RUN = """\
data: {train_files: train.jsonl, val_files: null, train_batch_size: 4}
actor_rollout_ref:
  model: {path: org/name}
  actor: {ppo_mini_batch_size: 4}
  rollout: {name: hf, n: 4}
critic: {model: {path: org/critic}, ppo_mini_batch_size: 4}
algorithm: {adv_estimator: grpo, use_kl_in_reward: false}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(RUN)


def config(*overrides: str) -> Config:
    return load("run.yaml", list(overrides)).config


def changes(
    *overrides: str, then: tuple[str, ...] = (), roles: tuple[str, ...] = ("actor",)
) -> dict[str, Any]:
    found = compare_config(config(*then).model_dump(mode="json"), config(*overrides), roles)
    return {change.what: change.effect for change in found}


def test_the_same_configuration_has_no_changes() -> None:
    assert changes() == {}


@pytest.mark.parametrize(
    ("override", "effect"),
    [
        ("trainer.logger=console", "harmless"),
        ("trainer.save_freq=7", "harmless"),
        ("data.train_files=moved.jsonl", "harmless"),
        ("actor_rollout_ref.rollout.val_kwargs.n=4", "harmless"),
        ("actor_rollout_ref.actor.optim.lr=3e-6", "numbers"),
        ("actor_rollout_ref.actor.clip_ratio_high=0.28", "numbers"),
        ("actor_rollout_ref.rollout.n=8", "numbers"),
        ("actor_rollout_ref.rollout.temperature=0.8", "numbers"),
        ("actor_rollout_ref.actor.fsdp_config.model_dtype=bf16", "numbers"),
        ("data.seed=9", "numbers"),
        ("trainer.total_epochs=3", "numbers"),
        ("trainer.n_gpus_per_node=2", "layout"),
        ("actor_rollout_ref.actor.megatron.tensor_model_parallel_size=2", "layout"),
        ("actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2", "layout"),
        ("actor_rollout_ref.rollout.gpu_memory_utilization=0.4", "layout"),
        ("actor_rollout_ref.model.path=org/other", "forbidden"),
        ("actor_rollout_ref.actor.strategy=megatron", "numbers"),
    ],
)
def test_a_change_of_a_key_says_what_it_means(override: str, effect: str) -> None:
    key = override.partition("=")[0]
    assert changes(override)[key] == effect


def test_a_key_that_follows_another_is_not_reported_beside_it() -> None:
    assert changes("data.max_response_length=99") == {"data.max_response_length": "numbers"}


def test_a_run_that_trains_a_critic_needs_one_in_the_checkpoint() -> None:
    found = changes("algorithm.adv_estimator=gae")
    assert found["critic"] == "forbidden"
    found = changes(
        "algorithm.adv_estimator=grpo", then=("algorithm.adv_estimator=gae",), roles=("actor", "critic")
    )
    assert found == {"algorithm.adv_estimator": "numbers"}
    found = changes("critic.model.path=org/x", "algorithm.adv_estimator=gae", then=("algorithm.adv_estimator=gae",),
                    roles=("actor", "critic"))  # fmt: skip
    assert found == {"critic.model.path": "forbidden"}


def test_settings_of_parts_that_the_run_does_not_have_are_not_compared() -> None:
    assert changes("critic.optim.lr=1", "reward_api.protocol=iiverl", then=()) == {}


def test_keys_of_another_version_are_left_out() -> None:
    then = config().model_dump(mode="json")
    then["trainer"]["of_yesterday"] = 1
    del then["actor_rollout_ref"]["rollout"]["seed"]
    then["data"] = None
    assert compare_config(then, config(), ("actor",)) == []


def test_every_pattern_decides_a_key_and_few_forbid() -> None:
    known = list(keys())
    for pattern, _, _ in EFFECTS:
        first = [key for key in known if next(p for p, _, _ in EFFECTS if re.fullmatch(p, key)) == pattern]
        assert first, pattern
    assert {key for key in known if effect_of(key)[0] == "forbidden"} == {
        f"{section}.{name}"
        for section in ("actor_rollout_ref.model", "critic.model")
        for name in (
            "path",
            "override_config",
            "lora_rank",
            "lora_alpha",
            "use_rslora",
            "target_modules",
            "exclude_modules",
            "lora_adapter_path",
        )
    }


@pytest.mark.parametrize(
    ("contents", "backend", "reason"),
    [
        ("[model,optimizer]", "same", None),
        ("[model,extra]", "same", "without optimizer .*\n.* iiverl export step DIR, and .*model.path=DIR"),
        ("[model,extra]", "other", None),
        ("[hf_model,optimizer]", "other", "without model .*\n.*model.path=step/actor/huggingface"),
        ("[extra]", "same", "without model and optimizer .*\nIt holds no weights"),
    ],
)
def test_a_checkpoint_without_what_a_run_resumes_from_says_what_to_do(
    contents: str, backend: str, reason: str | None
) -> None:
    then = config(f"actor_rollout_ref.actor.checkpoint.save_contents={contents}").model_dump(mode="json")
    found = missing_contents(then, Path("step"), reads_optimizer=backend == "same")
    assert (found is None) == (reason is None)
    assert reason is None or re.search(reason, found or "")
    assert missing_contents({}, Path("step"), reads_optimizer=True) is None  # of a version without the key


def test_another_dataset_forbids_and_other_truths_change_numbers() -> None:
    then = {"rows": 8, "prompts": "ab" * 32, "ground_truths": "cd" * 32, "columns": ["x"]}
    assert compare_dataset(then, then) == []
    (change,) = compare_dataset(then, {**then, "rows": 9})
    assert change.effect == "forbidden"
    assert forbidden([change]) == str(change)
    assert str(change).startswith("training prompts: 8 rows (abababab) -> 9 rows (abababab)")
    (change,) = compare_dataset(then, {**then, "ground_truths": "ee" * 32})
    assert (change.effect, forbidden([change])) == ("numbers", None)


def test_versions_are_those_of_what_is_installed() -> None:
    now = versions()
    assert {"python", "iiverl-core", "torch", "transformers"} <= now.keys()
    assert compare_versions(now, now) == []
    (change,) = compare_versions({**now, "torch": "1.0"}, now)
    assert str(change) == f"torch: 1.0 -> {now['torch']} (may round differently)"
