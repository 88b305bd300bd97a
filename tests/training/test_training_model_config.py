"""Every reader of a model's configuration applies `override_config` in the same way."""

import json
from pathlib import Path

import pytest
import torch

from iiverl_core.config import build, run_config
from iiverl_core.config.model_facts import fold_rope
from iiverl_core.errors import ConfigError
from iiverl_core.rollout.from_config import make_engine
from iiverl_core.training.model_config import read_model_config

DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(
    ("file", "override", "expected"),
    [
        ({}, {"rope_theta": 5}, {"rope_type": "default", "rope_theta": 5}),
        ({"rope_parameters": DEFAULT}, {"rope_theta": 5}, {**DEFAULT, "rope_theta": 5}),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, {"rope_theta": 5}, {**YARN, "rope_theta": 5}),
        ({"rope_theta": 7}, {"rope_scaling": YARN}, {**YARN, "rope_theta": 7}),
        ({"rope_parameters": DEFAULT}, {"rope_scaling": YARN}, {**DEFAULT, **YARN}),
        ({"text_config": {"rope_theta": 7}}, {"rope_scaling": YARN}, {**YARN, "rope_theta": 7}),
    ],
)
def test_rotary_settings_are_put_where_they_are_read(
    tmp_path: Path, file: dict, override: dict, expected: dict
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(file))
    folded = fold_rope(str(tmp_path), {"hidden_size": 8, **override})
    assert folded == {"hidden_size": 8, "rope_parameters": expected}


def test_other_overrides_stay_as_they_are(tmp_path: Path) -> None:
    for override in ({}, {"hidden_size": 8}, {"rope_theta": 5}):
        assert fold_rope(str(tmp_path / "absent"), override) == override


def test_the_engine_and_the_models_get_the_same_rotary_settings(tiny_model_path: Path) -> None:
    asked = {"rope_theta": 40000, "max_position_embeddings": 1024}
    model = {"path": str(tiny_model_path), "override_config": asked}
    run = run_config(
        build({"actor_rollout_ref": {"model": model, "rollout": {"name": "hf"}}, "critic": {"model": model}})
    )
    for role in run.roles.values():
        config = read_model_config(
            role.model.path, role.model.override_config, trust_remote_code=False, key=role.key("model")
        )
        assert config.rope_parameters["rope_theta"] == 40000 and config.max_position_embeddings == 1024
    engine = make_engine(run, torch.device("cpu"))
    assert engine._model.config.rope_parameters["rope_theta"] == 40000


def test_values_that_nothing_reads_are_refused(tiny_model_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"critic\.model\.override_config: .* has no rope_teta; correct"):
        read_model_config(str(tiny_model_path), {"rope_teta": 1}, trust_remote_code=False, key="critic.model")
