"""Whether whole runs learn, and resume: the quickstart's task on this device, through the command line."""

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from learning import QUICKSTART, ends, overrides

from gpu_check_parts.setting import NotPossibleError, Numbers, Setting
from iiverl_core.registry import BACKENDS

STEPS = 40
SAVED_STEP = 6
LEAST_RATIO = 2.0  # of the mean reward of the last steps to that of the first
COMMAND = (
    "from iiverl_cli.main import main; main()"  # works where the packages lie on the path without a script
)


def learn(
    setting: Setting, *, algorithm: str, backend: str = "fsdp", runtime: str = "local", engine: str = "hf"
) -> Numbers:
    """Train for some steps by an algorithm of `learning.py`; the reward must rise."""
    for module in {"ray": ["ray"], "local": []}[runtime] + {"vllm": ["vllm"], "hf": []}[engine]:
        if find_spec(module) is None:
            raise NotPossibleError(f"{module} is not installed")
    if missing := BACKENDS[backend].missing():
        raise NotPossibleError(missing)
    more = [
        f"trainer.runtime={runtime}",
        f"actor_rollout_ref.actor.strategy={backend}",
        "actor_rollout_ref.actor.megatron.tensor_model_parallel_size=1",
        f"actor_rollout_ref.rollout.name={engine}",
        "actor_rollout_ref.rollout.tensor_model_parallel_size=1",
    ]
    with TemporaryDirectory() as temporary:
        inputs = _make_inputs(Path(temporary))
        started = time.perf_counter()
        _train(setting, algorithm, inputs, inputs / "run", STEPS, more)
        seconds = time.perf_counter() - started
        first, last = ends(inputs / "run")
    if not last > LEAST_RATIO * first:
        raise ValueError(f"the reward did not rise: {first:.3f} at first, {last:.3f} after {STEPS} steps")
    return {"reward at first": first, "reward at last": last, "run s": seconds}


def resume(setting: Setting) -> Numbers:
    """Resume a run from the checkpoint in its middle, deterministically; the metrics must be those of the whole run."""
    more = [
        "trainer.deterministic=true",
        f"trainer.save_freq={SAVED_STEP}",
        "trainer.max_actor_ckpt_to_keep=2",
    ]
    with TemporaryDirectory() as temporary:
        inputs = _make_inputs(Path(temporary))
        whole, resumed = inputs / "whole", inputs / "resumed"
        _train(setting, "GRPO", inputs, whole, 2 * SAVED_STEP, more)
        checkpoint = whole / f"global_step_{SAVED_STEP}"
        more += ["trainer.resume_mode=resume_path", f"trainer.resume_from_path={checkpoint}"]
        _train(setting, "GRPO", inputs, resumed, 2 * SAVED_STEP, more)
        expected, found = (_results(folder) for folder in (whole, resumed))
    different = [
        f"{name} of step {step}"
        for step, metrics in found.items()
        for name, value in metrics.items()
        if expected[step].get(name) != value
    ]
    if different or not found:
        raise ValueError(f"the resumed run differs: {', '.join(different[:5]) or 'it has no steps'}")
    return {"resumed steps with equal metrics": len(found)}


def _results(folder: Path) -> dict[int, dict[str, float]]:
    """Read the metrics of each step that depend on neither time nor memory."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    prefixes = ("actor/", "critic/", "response_length/", "rollout/")
    return {
        line["step"]: {name: line[name] for name in line if name.startswith(prefixes)}
        for line in lines
        if line["step"] > 0
    }


def _make_inputs(folder: Path) -> Path:
    """Make the quickstart's data and model."""
    sys.path.insert(0, str(QUICKSTART))
    make_inputs = importlib.import_module("make_inputs")
    make_inputs.make_data(folder)
    make_inputs.make_model(folder / "model")
    return folder


def _train(
    setting: Setting, algorithm: str, inputs: Path, folder: Path, steps: int, more: Sequence[str]
) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-c", COMMAND, "train-ppo", QUICKSTART / "quickstart.yaml"),
            *(
                *overrides(algorithm, inputs, folder, 1, steps),
                f"trainer.device={setting.device.type}",
                *more,
            ),
        ],
        env={"OMP_NUM_THREADS": "1", **os.environ},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.stderr.write(done.stdout + done.stderr)
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise RuntimeError(f"the run ended with {done.returncode}: {' '.join(last)}")
