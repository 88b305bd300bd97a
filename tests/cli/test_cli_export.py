"""`iiverl export --push` uploads what it wrote, and says before it writes if it may not."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError
from typer.testing import CliRunner

from iiverl_cli.main import app
from iiverl_core.cluster import export as exporting


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The Hub's client, with its signatures, and without the Hub."""
    api = create_autospec(huggingface_hub.HfApi, instance=True)
    monkeypatch.setattr(exporting, "HfApi", lambda: api)
    return api


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that are written, each with one file."""
    folders: list[Path] = []

    def write(checkpoint: Path, target: Path, role: str, dtype: str | None, **_: Any) -> None:
        folders.append(target)
        target.mkdir()
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(exporting, "export", write)
    return folders


def invoke(tmp_path: Path) -> Any:
    command = ["export", str(tmp_path / "global_step_1"), str(tmp_path / "out"), "--push", "org/name"]
    return CliRunner().invoke(app, command)


def refusal() -> HfHubHTTPError:
    import httpx

    request = httpx.Request("POST", "https://huggingface.co/api/repos/create")
    return HfHubHTTPError("401 Unauthorized", response=httpx.Response(401, request=request))


def test_the_folder_is_uploaded_to_a_private_repository(
    hub: Any, written: list[Path], tmp_path: Path
) -> None:
    hub.upload_folder.return_value = SimpleNamespace(commit_url="https://hub/org/name/commit/1")
    result = invoke(tmp_path)
    assert result.exit_code == 0, result.output
    assert "uploaded: https://hub/org/name/commit/1" in result.output
    hub.create_repo.assert_called_once_with("org/name", private=True, exist_ok=True)
    hub.upload_folder.assert_called_once_with(repo_id="org/name", folder_path=tmp_path / "out")


def test_a_refusal_comes_before_anything_is_written(hub: Any, written: list[Path], tmp_path: Path) -> None:
    hub.create_repo.side_effect = refusal()
    result = invoke(tmp_path)
    assert result.exit_code == 2
    assert (
        "the repository org/name cannot be created: 401" in result.output and "hf auth login" in result.output
    )
    assert not written


def test_a_failed_upload_keeps_the_folder(hub: Any, written: list[Path], tmp_path: Path) -> None:
    hub.upload_folder.side_effect = refusal()
    result = invoke(tmp_path)
    assert result.exit_code == 1
    assert f"hf upload org/name {tmp_path}/out" in result.output
    assert (tmp_path / "out" / "config.json").exists()
