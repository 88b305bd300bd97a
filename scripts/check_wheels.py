"""Build every package and try the wheels as a user would: outside the workspace, without the lock.

Usage: check_wheels.py PATH_OF_UV

What is installed are the newest versions that the packages allow, so a release that breaks iiverl shows here first.
Lower the bound in `pyproject.toml`, or make the code work with the release and raise the bound.
"""

import json
import re
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
WATCHED = (
    "torch",
    "transformers",
    "ray",
    "datasets",
    "numpy",
    "pydantic",
    "megatron-core",
    "fastapi",
    "uvicorn",
)


def run(*command: str | Path, cwd: Path, quiet: bool = False) -> str:
    """Run a command and return what it printed; stop everything if it fails or if a deprecation warning appears."""
    print("$", *command, flush=True)
    done = subprocess.run(
        command, cwd=cwd, check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if not quiet or done.returncode:
        print(done.stdout, flush=True)
    if done.returncode:
        sys.exit(done.returncode)
    if warning := re.search(r".*\b(FutureWarning|DeprecationWarning)\b.*", done.stdout):
        sys.exit(f"a newer version of a dependency deprecates something that is used: {warning[0]}")
    return done.stdout


def refused(*command: str | Path, cwd: Path) -> str:
    """Run a command that has to fail; return the one error that it printed, and stop everything if it has another."""
    print("$", *command, flush=True)
    done = subprocess.run(command, cwd=cwd, check=False, text=True, capture_output=True)
    print(done.stdout + done.stderr, flush=True)
    lines = [line for line in done.stderr.splitlines() if "warning: " not in line]
    if not done.returncode or len(lines) != 1:
        sys.exit(f"one line and a failure were expected, not {len(lines)} lines and status {done.returncode}")
    return lines[0]


def main(uv: Path) -> None:
    """Build, install each of the packages that a user installs, and train with them."""
    with tempfile.TemporaryDirectory(prefix="iiverl-wheels-") as name:
        outside = Path(name)
        wheels = outside / "wheels"
        run(uv, "build", "--all-packages", "--wheel", "--out-dir", wheels, cwd=ROOT, quiet=True)

        def install(environment: str, what: str) -> Path:
            python = outside / environment / "bin" / "python"
            if not python.exists():
                run(uv, "venv", "--python", sys.executable, environment, cwd=outside, quiet=True)
            # Run outside the workspace, whose overrides and lock a user does not have.
            run(
                uv, "pip", "install", "--python", python, "--find-links", wheels, what,
                cwd=outside, quiet=True,
            )  # fmt: skip
            return python

        def installed(python: Path) -> dict[str, str]:
            listed = run(uv, "pip", "list", "--format", "json", "--python", python, cwd=outside, quiet=True)
            return {package["name"]: package["version"] for package in json.loads(listed)}

        client = install("client", "iiverl-reward-client")
        heavy = installed(client).keys() & {"torch", "ray", "fastapi", "pydantic", "iiverl-core"}
        if heavy:
            sys.exit(f"iiverl-reward-client alone brings {', '.join(sorted(heavy))}")
        run(client, "-c", "import iiverl_reward_client", cwd=outside)
        server = client.parent / "iiverl-reward-server"
        if "pip install 'iiverl-reward-client[server]'" not in refused(server, cwd=outside):
            sys.exit("iiverl-reward-server does not say how to install what it needs")
        install("client", "iiverl-reward-client[server]")
        run(server, "--help", cwd=outside, quiet=True)
        run(client, "-m", "iiverl_reward_client.server.openapi", cwd=outside, quiet=True)

        full = install("full", "iiverl[fsdp]")
        versions = installed(full)
        print("newest allowed:", *(f"{name} {versions[name]}" for name in WATCHED if name in versions))
        shutil.copytree(
            ROOT / QUICKSTART, outside / QUICKSTART, ignore=shutil.ignore_patterns("inputs", "run")
        )
        run(full, QUICKSTART / "make_inputs.py", cwd=outside)
        command = (full.parent / "iiverl", "train-ppo", QUICKSTART / "quickstart.yaml")
        run(*command, "trainer.total_training_steps=10", cwd=outside)

        hint = refused(*command, *UNDER_MEGATRON, cwd=outside)
        if "pip install 'iiverl[megatron]'" not in hint:
            sys.exit("the error without iiverl[megatron] does not say how to install it")
        hint = refused(*command, "actor_rollout_ref.rollout.name=vllm", cwd=outside)
        if "pip install 'iiverl[vllm]'" not in hint:
            sys.exit("the error without iiverl[vllm] does not say how to install it")
        install("full", "iiverl[megatron]")
        if any(name.startswith("transformer-engine") for name in installed(full)):
            sys.exit("iiverl[megatron] brings Transformer Engine")
        run(*command, *UNDER_MEGATRON, cwd=outside)
        print("wheels: built, installed without the lock and run outside the workspace")


if __name__ == "__main__":
    main(Path(shutil.which(sys.argv[1]) or sys.argv[1]).resolve())
