"""The check of a GPU runs on a CPU too, with its tiny model: every part gives numbers, and none fails."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_check.py"
SPEED = {"train tokens/s", "log-prob tokens/s"}
ENGINE = {"generated tokens/s", "weight update s", "rollout/kl", "rollout/ratio/max"}
GRADIENTS = {
    f"{what} {how}, off by %" for what in ("log-probs", "gradient norms") for how in ("packed", "padded")
}
VALUES = {f"{what} {how}, off by %" for what in ("critic", "reward") for how in ("packed", "padded")}
NUMBERS = {
    "model": {"parameters M"},
    "train packed": SPEED,
    "train padded": SPEED,
    "train offload": set(),
    "train megatron": SPEED,
    "reference": {"log-prob tokens/s"},
    "rollout hf": ENGINE,
    "rollout vllm": ENGINE,
    "gradients": GRADIENTS,
    "value models": VALUES,
    "gradients megatron": GRADIENTS,
    "value models megatron": VALUES,
    "learn GRPO": {"reward at first", "reward at last", "run s"},
}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPT, "--device", "cpu", "--repeats", "1", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_all_parts_run_on_a_cpu(tmp_path: Path) -> None:
    done = run(
        "--json", str(tmp_path / "result.json"), "--only", *(part for part in NUMBERS if part != "model")
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert {
        "device",
        "memory",
        "python",
        "torch",
        "CUDA",
        "transformers",
        "ray",
        "vllm",
        "flash-attn",
        "megatron-core",
    } <= result["machine"].keys()
    parts = {row["part"]: row for row in result["parts"]}
    impossible = {"train offload"} | (set() if find_spec("vllm") else {"rollout vllm"})
    assert {name for name, row in parts.items() if row["state"] == "not possible"} == impossible
    assert {row["state"] for name, row in parts.items() if name not in impossible} == {"ok"}
    for name, row in parts.items():
        assert row["size"] == "tiny" and bool(row["reason"]) == (name in impossible)
        assert row["numbers"].keys() == (set() if name in impossible else NUMBERS[name])
        assert all(value >= 0 for value in row["numbers"].values())
        assert f"| {name} | tiny | " in done.stdout


@pytest.mark.slow
def test_what_fails_is_a_row_that_says_why_and_the_exit_code_is_1(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    done = run("--json", str(file), "--timeout", "0.01", "--only", "reference")
    assert done.returncode == 1
    assert [row["state"] for row in json.loads(file.read_text())["parts"]] == ["failed"]
    assert "no end after" in done.stdout
