"""Install hints: a command that works in the installation that shows it."""

import importlib.metadata
from collections.abc import Iterator

import pytest

from iiverl_core import installation
from iiverl_core.config import vllm
from iiverl_core.installation import in_workspace, install_command
from iiverl_core.registry.backends import BackendInfo

MISSING = BackendInfo(name="fsdp", title="FSDP", summary="a backend that is not installed", code="")


@pytest.fixture(params=[None, "{}", '{"url": "file:///x.whl", "archive_info": {}}'])
def from_wheels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An installation from an index or from a wheel's file, as pip and uv record it."""

    class Distribution:
        def read_text(self, name: str) -> str | None:
            assert name == "direct_url.json"
            return request.param

    in_workspace.cache_clear()
    monkeypatch.setattr(installation, "distribution", lambda name: Distribution())
    yield
    in_workspace.cache_clear()


def test_hints_of_an_installation_from_wheels(from_wheels: None) -> None:
    message = str(vllm.version_problem(None))
    assert "Install it with: pip install 'iiverl[vllm]', or set " in message
    assert "uv" not in message and "make" not in message
    assert str(MISSING.missing()).endswith(": pip install 'iiverl[fsdp]'")
    assert install_command("wandb", "mlflow") == "pip install wandb mlflow"


def test_hints_of_a_clone() -> None:
    """The tests run in one, whose environment has no pip."""
    assert in_workspace()
    assert str(MISSING.missing()).endswith(": make setup")
    assert install_command("wandb") == "uv pip install wandb"


def test_extras_that_hints_name_exist() -> None:
    extras = importlib.metadata.metadata("iiverl").get_all("Provides-Extra") or []
    assert {"vllm", "fsdp", "megatron", "reward-server"} <= set(extras)
