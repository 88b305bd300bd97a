"""The command as a process: what it imports, how it ends."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# Without these a command answers at once: --help takes 0.2 s of CPU time, validate a second.
HEAVY = ("torch", "ray", "transformers", "datasets", "numpy", "pandas", "pyarrow", "httpx", "fastapi")

WITH_A_LOOP = """
import sys, time, types
controller = types.ModuleType("iiverl_core.controller")
def train(loaded, stop):
    try:
        print("started", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        print("cleaned up", flush=True)
        raise
controller.train = train
sys.modules["iiverl_core.controller"] = controller
from iiverl_cli.main import main
main()
"""

RUNNABLE = """\
data: {train_files: train.jsonl, val_files: null, train_batch_size: 4}
actor_rollout_ref:
  model: {path: org/name}
  actor: {ppo_mini_batch_size: 4}
  rollout: {name: hf, n: 4}
algorithm: {adv_estimator: grpo, use_kl_in_reward: false}
trainer: {n_gpus_per_node: 2}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(RUNNABLE)
    Path("train.jsonl").write_text(
        4 * '{"prompt": "1+1?", "data_source": "openai/gsm8k", "ground_truth": "2"}\n'
    )


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["validate", "run.yaml"], 0),
        (["config", "show", "run.yaml"], 0),
        (["train-ppo", "run.yaml", "data.seed=x"], 2),
    ],
)
def test_nothing_heavy_is_imported(arguments: list[str], code: int) -> None:
    program = (
        "import atexit, sys\n"
        f"atexit.register(lambda: print([m for m in {HEAVY} if m in sys.modules], file=sys.stderr))\n"
        f"sys.argv = ['iiverl', *{arguments}]\n"
        "from iiverl_cli.main import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("stop", "code", "told"),
    [
        (signal.SIGINT, 130, "interrupted\n"),
        (signal.SIGTERM, 143, "terminated\n"),
        (signal.SIGHUP, 129, "terminated\n"),
    ],
)
def test_a_stopped_run_cleans_up_and_says_so(stop: signal.Signals, code: int, told: str) -> None:
    run = subprocess.Popen(
        [sys.executable, "-c", WITH_A_LOOP, "train-ppo", "run.yaml"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert run.stdout is not None
    assert run.stdout.readline() == "started\n"
    began = time.monotonic()
    run.send_signal(stop)
    out, err = run.communicate(timeout=10)
    assert (run.returncode, out, err) == (code, "cleaned up\n", told)
    assert time.monotonic() - began < 5
