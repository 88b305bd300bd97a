"""Build every package and try the wheels as a user would get them: outside the workspace, in new environments.

Usage: check_wheels.py PATH_OF_UV
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = Path("examples") / "quickstart"
MEGATRON = "actor_rollout_ref.actor.megatron"
UNDER_MEGATRON = (
    "--backend",
    "megatron",
    f"{MEGATRON}.tensor_model_parallel_size=1",
    f"{MEGATRON}.dtype=fp32",
    "trainer.runtime=local",
    "trainer.n_gpus_per_node=1",
    "trainer.total_training_steps=2",
    "trainer.default_local_dir=run-megatron",
    "trainer.rollout_data_dir=null",
)


def run(*command: str | Path, cwd: Path, quiet: bool = False) -> str:
    """Run a command and stop everything if it fails; give back what it printed."""
    print("$", *command, flush=True)
    done = subprocess.run(command, cwd=cwd, check=False, text=True, capture_output=True)
    if not quiet or done.returncode:
        print(done.stdout + done.stderr, flush=True)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def refused(*command: str | Path, cwd: Path) -> str:
    """Run a command that has to fail; give back the one error that it printed, and stop everything if it has another."""
    print("$", *command, flush=True)
    done = subprocess.run(command, cwd=cwd, check=False, text=True, capture_output=True)
    print(done.stdout + done.stderr, flush=True)
    lines = [line for line in done.stderr.splitlines() if "warning: " not in line]
    if not done.returncode or len(lines) != 1:
        sys.exit(f"one line and a failure were expected, not {len(lines)} lines and status {done.returncode}")
    return lines[0]


def main(uv: Path) -> None:
    """Build, install `iiverl-reward-client` apart from `iiverl[fsdp]` and `iiverl[megatron]`, and look at what came."""
    with tempfile.TemporaryDirectory(prefix="iiverl-wheels-") as name:
        outside = Path(name)
        wheels = outside / "wheels"
        run(uv, "build", "--all-packages", "--wheel", "--out-dir", wheels, cwd=ROOT, quiet=True)

        def install(environment: str, *what: str) -> Path:
            python = outside / environment / "bin" / "python"
            if not python.exists():
                run(uv, "venv", "--python", sys.executable, environment, cwd=outside, quiet=True)
            # Versions as locked: what is tried here is the packaging, not tomorrow's releases.
            pins = outside / "pins.txt"
            run(
                uv,
                "pip",
                "install",
                "--python",
                python,
                "--find-links",
                wheels,
                "-c",
                pins,
                *what,
                cwd=outside,
            )
            return python

        def installed(python: Path) -> set[str]:
            listed = run(uv, "pip", "list", "--format", "json", "--python", python, cwd=outside, quiet=True)
            return {package["name"] for package in json.loads(listed)}

        pins = run(
            uv, "pip", "freeze", "--exclude-editable", "--python", sys.executable, cwd=ROOT, quiet=True
        )
        (outside / "pins.txt").write_text(pins)

        client = install("client", "iiverl-reward-client")
        heavy = installed(client) & {"torch", "ray", "iiverl-core"}
        if heavy:
            sys.exit(f"iiverl-reward-client alone brings {', '.join(sorted(heavy))}")
        run(client, "-c", "import iiverl_reward_client", cwd=outside)

        full = install("full", "iiverl[fsdp]")
        shutil.copytree(
            ROOT / QUICKSTART, outside / QUICKSTART, ignore=shutil.ignore_patterns("inputs", "run")
        )
        run(full, QUICKSTART / "make_inputs.py", cwd=outside)
        command = (full.parent / "iiverl", "train-ppo", QUICKSTART / "quickstart.yaml")
        run(*command, "trainer.total_training_steps=3", cwd=outside)

        told = refused(*command, *UNDER_MEGATRON, cwd=outside)
        if "pip install 'iiverl[megatron]'" not in told:
            sys.exit("what is told without iiverl[megatron] does not say how to install it")
        install("full", "iiverl[megatron]")
        if any(name.startswith("transformer-engine") for name in installed(full)):
            sys.exit("iiverl[megatron] brings Transformer Engine")
        run(*command, *UNDER_MEGATRON, cwd=outside)
        print("wheels: built, installed and run outside the workspace")


if __name__ == "__main__":
    main(Path(shutil.which(sys.argv[1]) or sys.argv[1]).resolve())
