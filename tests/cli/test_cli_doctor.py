"""`iiverl doctor` says what a machine has, and what is in the way."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from iiverl_cli.main import app
from iiverl_core import doctor
from iiverl_core.registry import BACKENDS

runner = CliRunner()


@pytest.fixture
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver with two GPUs, which torch does not see."""
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\necho 'NVIDIA H200, 143771, 580.95.05'\necho 'NVIDIA H200, 143771, 580.95.05'\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.fixture
def enough_of_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LEAST_SHARED_MEMORY", "LEAST_FILES", "LEAST_SPACE"):
        monkeypatch.setattr(doctor, name, 0)
    monkeypatch.setattr(doctor, "find_gpus", list)


@pytest.mark.usefixtures("enough_of_everything")
def test_a_machine_without_gpus_has_no_problem() -> None:
    done = runner.invoke(app, ["doctor"])
    assert done.exit_code == 0, done.output
    assert "none: runs use the processor" in done.output
    assert "fsdp" in done.output and "torch" in done.output
    found = json.loads(runner.invoke(app, ["doctor", "--json"]).output)
    assert set(found) == {"facts", "packages", "usable", "missing", "problems"}
    for name, reason in found["missing"].items():
        assert "install" in reason, name


@pytest.mark.usefixtures("two_gpus")
def test_gpus_that_torch_does_not_see_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.version.cuda", "13.0")
    done = runner.invoke(app, ["doctor"])
    assert "2 × NVIDIA H200, 140.4 GiB (driver 580.95.05)" in done.output
    assert "does not see the 2 GPUs" in done.output and "driver may be too old" in done.output
    assert done.exit_code == 2
    monkeypatch.setattr("torch.version.cuda", None)
    assert "install a build for CUDA" in runner.invoke(app, ["doctor"]).output
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "does not see" not in runner.invoke(app, ["doctor"]).output


@pytest.mark.usefixtures("enough_of_everything")
@pytest.mark.parametrize(
    ("limit", "advice"),
    [("LEAST_SHARED_MEMORY", "--shm-size"), ("LEAST_FILES", "ulimit -n"), ("LEAST_SPACE", "TMPDIR")],
)
def test_too_little_of_something_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, limit: str, advice: str
) -> None:
    monkeypatch.setattr(doctor, limit, 2**60)
    done = runner.invoke(app, ["doctor"])
    assert advice in done.output
    assert done.exit_code == 2


@pytest.mark.usefixtures("enough_of_everything")
def test_a_machine_without_a_backend_cannot_train(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "the backend is not installed; install it with: this"
    for backend in BACKENDS.values():
        monkeypatch.setattr(type(backend), "missing", lambda self: reason)
    done = runner.invoke(app, ["doctor"])
    assert reason in done.output and "no training backend is installed" in done.output
    assert done.exit_code == 2
