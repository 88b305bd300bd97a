"""Whether whole runs learn: the quickstart's task on this device, through the command line."""

import importlib
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from learning import QUICKSTART, ends, overrides

from gpu_check_parts.setting import NotPossibleError, Numbers, Setting
from iiverl_core.registry import BACKENDS

STEPS = 40
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
    sys.path.insert(0, str(QUICKSTART))
    make_inputs = importlib.import_module("make_inputs")

    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_inputs.make_data(folder)
        make_inputs.make_model(folder / "model")
        more = [
            f"trainer.device={setting.device.type}",
            f"trainer.runtime={runtime}",
            f"actor_rollout_ref.actor.strategy={backend}",
            "actor_rollout_ref.actor.megatron.tensor_model_parallel_size=1",
            f"actor_rollout_ref.rollout.name={engine}",
            "actor_rollout_ref.rollout.tensor_model_parallel_size=1",
        ]
        started = time.perf_counter()
        done = subprocess.run(
            [
                *(sys.executable, "-c", COMMAND, "train-ppo", QUICKSTART / "quickstart.yaml"),
                *(*overrides(algorithm, folder, folder / "run", 1, STEPS), *more),
            ],
            env={"OMP_NUM_THREADS": "1", **os.environ},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            sys.stderr.write(done.stdout + done.stderr)
            last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
            raise RuntimeError(f"the run ended with {done.returncode}: {' '.join(last)}")
        seconds = time.perf_counter() - started
        first, last = ends(folder / "run")
    if not last > LEAST_RATIO * first:
        raise ValueError(f"the reward did not rise: {first:.3f} at first, {last:.3f} after {STEPS} steps")
    return {"reward at first": first, "reward at last": last, "run s": seconds}
