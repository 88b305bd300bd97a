"""The JSON Schema accepts the files that are valid, and refuses misspelled keys and values of a wrong type."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from iiverl_core.config.json_schema import json_schema

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(ROOT.glob("examples/*/*.yaml"))


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    schema = json_schema()
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_are_accepted(validator: Draft202012Validator, path: Path) -> None:
    problems = [
        f"{error.json_path}: {error.message}"
        for error in validator.iter_errors(yaml.safe_load(path.read_text()))
    ]
    assert problems == []


@pytest.mark.parametrize(
    "accepted",
    [
        {"data": {"train_files": "a.parquet"}},
        {"data": {"train_files": ["a.parquet", "b.parquet"]}},
        {"trainer": {"logger": "wandb", "total_training_steps": "${trainer.total_epochs}"}},
        {"trainer": {"project_name": 2026}},
        {"algorithm": {"adv_estimator": "mine.py:centred"}},
        {"critic": None},
        {"actor_rollout_ref": {"actor": {"fsdp_config": {"mixed_precision": {"param_dtype": "fp32"}}}}},
        {"actor_rollout_ref": {"rollout": {"engine_kwargs": {"vllm": {"anything": 1}}}}},
        {"async_training": {"staleness_threshold": 0.5}},
        {"reward": {"reward_manager": {"name": "naive"}}},
    ],
)  # fmt: skip
def test_what_a_file_may_hold_is_accepted(validator: Draft202012Validator, accepted: Any) -> None:
    assert [error.message for error in validator.iter_errors(accepted)] == []


@pytest.mark.parametrize(
    ("refused", "path"),
    [
        ({"trainer": {"max_stalenes": 1}}, "$.trainer"),
        ({"trainr": {}}, "$"),
        ({"trainer": {"max_staleness": -1}}, "$.trainer.max_staleness"),
        ({"trainer": {"max_staleness": "one"}}, "$.trainer.max_staleness"),
        ({"algorithm": {"adv_estimator": "grppo"}}, "$.algorithm.adv_estimator"),
        ({"trainer": {"runtime": "slurm"}}, "$.trainer.runtime"),
        ({"data": {"train_files": [1, {}]}}, "$.data.train_files"),
        ({"actor_rollout_ref": {"actor": {"optim": {"lr": [1]}}}}, "$.actor_rollout_ref.actor.optim.lr"),
    ],
)
def test_mistakes_are_refused_at_their_place(
    validator: Draft202012Validator, refused: Any, path: str
) -> None:
    assert [error.json_path for error in validator.iter_errors(refused)] == [path]


def test_keys_have_descriptions(validator: Draft202012Validator) -> None:
    trainer = validator.schema["properties"]["trainer"]["properties"]
    assert all(key["description"] for key in trainer.values())
