"""Build every package and try the wheels as a user would get them: outside the workspace, in new environments.

Usage: check_wheels.py PATH_OF_UV
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = Path("examples") / "quickstart"


def run(*command: str | Path, cwd: Path, quiet: bool = False) -> str:
    """Run a command and stop everything if it fails; give back what it printed."""
    print("$", *command, flush=True)
    done = subprocess.run(command, cwd=cwd, check=False, text=True, capture_output=True)
    if not quiet or done.returncode:
        print(done.stdout + done.stderr, flush=True)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def main(uv: Path) -> None:
    """Build, install `iiverl[fsdp]` and `iiverl-reward-client` apart, and look at what came."""
    with tempfile.TemporaryDirectory(prefix="iiverl-wheels-") as name:
        outside = Path(name)
        wheels = outside / "wheels"
        run(uv, "build", "--all-packages", "--wheel", "--out-dir", wheels, cwd=ROOT, quiet=True)

        def install(environment: str, *what: str) -> Path:
            run(uv, "venv", "--python", sys.executable, environment, cwd=outside, quiet=True)
            python = outside / environment / "bin" / "python"
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

        pins = run(
            uv, "pip", "freeze", "--exclude-editable", "--python", sys.executable, cwd=ROOT, quiet=True
        )
        (outside / "pins.txt").write_text(pins)

        client = install("client", "iiverl-reward-client")
        listed = run(uv, "pip", "list", "--python", client, cwd=outside).lower()
        for heavy in ("torch", "ray", "iiverl-core"):
            if any(line.split()[:1] == [heavy] for line in listed.splitlines()):
                sys.exit(f"iiverl-reward-client alone brings {heavy}")
        run(client, "-c", "import iiverl_reward_client", cwd=outside)

        full = install("full", "iiverl[fsdp]")
        shutil.copytree(
            ROOT / QUICKSTART, outside / QUICKSTART, ignore=shutil.ignore_patterns("inputs", "run")
        )
        run(full, QUICKSTART / "make_inputs.py", cwd=outside)
        command = (full.parent / "iiverl", "train-ppo", QUICKSTART / "quickstart.yaml")
        run(*command, "trainer.total_training_steps=3", cwd=outside)
        print("wheels: built, installed and run outside the workspace")


if __name__ == "__main__":
    main(Path(shutil.which(sys.argv[1]) or sys.argv[1]).resolve())
