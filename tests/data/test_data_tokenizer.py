"""The tokenizer that the configuration names."""

from pathlib import Path

import pytest

from iiverl_core.config import RunConfig, build, run_config
from iiverl_core.data import load_tokenizer
from iiverl_core.errors import ConfigError


def config(model: Path | str, tokenizer: Path | str | None = None) -> RunConfig:
    values = {
        "data": {"tokenizer": None if tokenizer is None else str(tokenizer)},
        "actor_rollout_ref": {"model": {"path": str(model)}},
    }
    return run_config(build(values))


def test_the_models_own_tokenizer_is_taken(tiny_model_path: Path) -> None:
    assert load_tokenizer(config(tiny_model_path))("2+3")["input_ids"] == [17, 10, 18]


def test_another_tokenizer_is_taken_where_one_is_named(tiny_model_path: Path, tmp_path: Path) -> None:
    assert load_tokenizer(config(tmp_path / "none", tiny_model_path)).eos_token_id == 258


def test_a_folder_without_a_tokenizer_names_the_key(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^actor_rollout_ref\.model\.path: no tokenizer could be read from /"
    ):
        load_tokenizer(config(tmp_path))
    with pytest.raises(ConfigError, match=r"^data\.tokenizer: no tokenizer could be read from /.*no-such"):
        load_tokenizer(config(tmp_path, tmp_path / "no-such"))
