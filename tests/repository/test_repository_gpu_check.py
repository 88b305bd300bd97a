"""The check of a GPU runs on a CPU too, with its tiny model: every part gives numbers, and none fails."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import psutil
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
    "head": {"gradients off by", "at once s", "in tiles s"},
    "save": {
        *("step s", "step with save s", "ratio", "waited s", "waited at first s"),
        *("written after s", "saved GiB"),
    },
    "vision": {
        f"{model} {number}"
        for model in ("Qwen2.5-VL", "Qwen3-VL")
        for number in ("rollout/kl", "rollout/ratio/max", "kl with other images")
    },
    "learn GRPO": {"reward at first", "reward at last", "run s"},
}


def load_plan() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "gpu_check_plan", SCRIPT.parent / "gpu_check_parts" / "plan.py"
    )
    assert spec and spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PLAN = load_plan()
SIZES = ("tiny", "0.5b", "1.5b")
MINUTES = 8


def test_the_plan_for_one_gpu_takes_eight_minutes() -> None:
    chosen = PLAN.choose(SIZES, None, 60 * MINUTES)
    assert PLAN.estimate(chosen) <= 60 * MINUTES
    assert list(PLAN.lines(chosen))[-1].startswith("7:")
    parts = {each.part for each in chosen}
    assert {"gradients", "train packed", "rollout vllm", "learn GRPO vllm", "gradients megatron"} <= parts


@pytest.mark.parametrize("seconds", [None, 0, 60, 200, 480, 3600])
def test_a_plan_is_in_order_and_makes_each_model_first(seconds: int | None) -> None:
    chosen = PLAN.choose(SIZES, None, seconds)
    assert len(set(chosen)) == len(chosen)
    measured = [each for each in chosen if each.part != PLAN.MODEL]
    assert measured == [each for each in PLAN.ORDER if each in measured]
    for each in measured:
        assert (PLAN.MODEL, each.size) in [(other.part, other.size) for other in chosen[: chosen.index(each)]]
    if seconds is None:
        assert measured == list(PLAN.ORDER)
    else:
        assert PLAN.estimate(chosen) <= seconds


def test_parts_without_their_package_leave_their_time_to_others() -> None:
    chosen = PLAN.choose(SIZES, None, 60 * MINUTES, missing={"vllm", "megatron"})
    assert PLAN.estimate(chosen) <= 60 * MINUTES
    assert ("rollout vllm", 0) in [(each.part, each.seconds) for each in chosen]
    with_all = PLAN.choose(SIZES, None, 60 * MINUTES)
    assert sum(each.seconds > 0 for each in chosen) > len(with_all)


def test_a_plan_has_the_sizes_and_the_parts_that_were_asked_for() -> None:
    chosen = PLAN.choose(["tiny"], ["train packed", "gradients"])
    assert [(each.part, each.size) for each in chosen] == [
        ("model", "tiny"),
        ("gradients", "tiny"),
        ("train packed", "tiny"),
    ]


@pytest.mark.slow
def test_imports_before_the_parts_are_forked_leave_cuda_alone_with_flash_attn(tmp_path: Path) -> None:
    """transformers asks for devices when it is imported, if flash-attn is installed; parts could then not use CUDA."""
    (tmp_path / "flash_attn-2.8.3.dist-info").mkdir()
    (tmp_path / "flash_attn-2.8.3.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: flash-attn\nVersion: 2.8.3\n"
    )
    (tmp_path / "flash_attn.py").write_text('__version__ = "2.8.3"\n')
    code = """
import importlib, torch
asked = []
counted = torch._C._cuda_getDeviceCount
torch._C._cuda_getDeviceCount = lambda: asked.append(1) or counted()
import gpu_check
for name in gpu_check.PRELOADED:
    importlib.import_module(name)
assert not asked, "CUDA was asked for devices"
assert not torch.cuda.is_initialized()
"""
    path = os.pathsep.join([str(tmp_path), str(SCRIPT.parent)])
    environment = {
        name: value for name, value in os.environ.items() if name != "PYTORCH_NVML_BASED_CUDA_CHECK"
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**environment, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr


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
    assert [row["part"] for row in result["parts"]] == [each["part"] for each in result["plan"]]
    assert result["expected seconds"] == sum(each["seconds"] for each in result["plan"])
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
def test_when_the_time_is_over_what_is_left_is_not_run(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    code = "import sys, gpu_check; gpu_check.choose = lambda *_, **__: gpu_check_plan.ORDER; sys.exit(gpu_check.main())"
    code = code.replace("gpu_check_plan", "sys.modules['gpu_check_parts.plan']")
    done = subprocess.run(
        [sys.executable, "-c", code, "--device", "cpu", "--minutes", "1e-9", "--json", str(file)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(SCRIPT.parent)},
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())["parts"]
    assert {row["state"] for row in rows} == {"not run"}
    assert len(rows) == len(PLAN.ORDER)


@pytest.mark.slow
def test_what_fails_is_a_row_that_says_why_and_the_exit_code_is_1(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    done = run("--json", str(file), "--timeout", "0.01", "--only", "reference")
    assert done.returncode == 1
    assert [row["state"] for row in json.loads(file.read_text())["parts"]] == ["failed", "not run"]
    assert "no end after" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_asked_to_end_it_leaves_no_process(tmp_path: Path) -> None:
    """Nor the run of the command that a part has started."""
    command = [
        sys.executable,
        SCRIPT,
        "--device",
        "cpu",
        "--only",
        "learn GRPO",
        "--json",
        tmp_path / "result.json",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as checking:
        deadline = time.monotonic() + 400
        while not any("train-ppo" in each.cmdline() for each in _below(checking.pid)):
            assert checking.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        processes = _below(checking.pid)
        checking.send_signal(signal.SIGTERM)
        assert checking.wait(60) == 128 + signal.SIGTERM
        assert not psutil.wait_procs(processes, timeout=30)[1]


def _below(pid: int) -> list[psutil.Process]:
    """The processes that one has started, and theirs, as far as they are still there."""
    found = []
    for each in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            each.cmdline()
            found.append(each)
    return found
