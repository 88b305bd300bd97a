"""The tokenizer that the configuration names."""

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from iiverl_core.config import RunConfig, build, run_config
from iiverl_core.data import load_tokenizer
from iiverl_core.errors import ConfigError

if TYPE_CHECKING:
    from data.hub_server import HubServer


def config(model: Path | str, tokenizer: Path | str | None = None) -> RunConfig:
    values = {
        "data": {
            "tokenizer": None if tokenizer is None else str(tokenizer),
            "max_prompt_length": 256,
            "max_response_length": 256,
        },
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
    with pytest.raises(ConfigError, match=r"^data\.tokenizer: there is no folder /.*no-such\.\n"):
        load_tokenizer(config(tmp_path, tmp_path / "no-such"))


def test_a_hub_that_cannot_be_reached_is_asked_once(tmp_path: Path) -> None:
    """In a process of its own, since the endpoint is read when the library is imported."""
    names = ["org/none", "no-such-folder", "not a name/at all"]
    code = (
        "import sys; from iiverl_core.data import check_model; from iiverl_core.errors import ConfigError\n"
        "for name in sys.argv[1:]:\n"
        "    try: check_model('data.tokenizer', name)\n"
        "    except ConfigError as error: print(str(error).splitlines()[0])"
    )
    environment = {"HF_ENDPOINT": "http://127.0.0.1:1", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code, *names],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **environment, "NO_PROXY": "127.0.0.1"},
    )
    told = done.stdout.splitlines()
    for name, line in zip(names[:2], told, strict=False):
        assert line.startswith(f"data.tokenizer: there is no folder {name}, and the Hub at ")
    assert told[2:] == [f"data.tokenizer: there is no folder {names[2]}."]  # no name of the Hub's


def test_a_model_that_the_hub_does_not_have(hub: "HubServer", tmp_path: Path) -> None:
    code = (
        "from iiverl_core.data import check_model; from iiverl_core.errors import ConfigError\n"
        "try: check_model('data.tokenizer', 'org/none')\n"
        "except ConfigError as error: print(error)"
    )
    asked = len(hub.requests)
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **hub.environment(str(tmp_path))},
    )
    assert "there is no folder org/none, and no such model on" in done.stdout
    assert hub.requests[asked:] == ["GET /api/models/org/none"]
