"""The script for Slurm on two Ray nodes of this machine: it trains, and is queued again when it is pre-empted."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from iiverl_cli.main import app

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart" / "quickstart.yaml"
SRUN = """#!/bin/bash
# Runs a step on this machine, whatever machine it asks for.
while [[ $1 == --* ]]; do shift; done
echo "$RAY_AUTH_TOKEN" > token
exec "$@"
"""
SCONTROL = """#!/bin/bash
case "$1 $2" in
    "show hostnames") printf '127.0.0.1\\nsecond\\n' ;;
    "show job") echo "   JobState=RUNNING Reason=None" ;;
    *) echo "$@" >> scontrol.log ;;
esac
"""
ASK = """\
from iiverl_core.cluster.ray_connection import start_ray
from iiverl_core.errors import ConfigError
try:
    start_ray(cpus=1, nodes=3, timeout_s=1)
except ConfigError as error:
    print(error)
"""


@pytest.fixture
def job(quickstart_overrides: Callable[..., list[str]], tmp_path: Path) -> Iterator[subprocess.Popen]:
    """A job on two "machines" of one process each, that trains until it is told to end."""
    overrides = quickstart_overrides(
        *("trainer.nnodes=2", "trainer.n_gpus_per_node=1", "trainer.device=cpu"),
        *("trainer.save_freq=1000", "trainer.resume_mode=auto", "trainer.total_training_steps=1000"),
        runtime="ray",
    )
    result = CliRunner().invoke(app, ["launch", "slurm", str(QUICKSTART), *overrides])
    assert result.exit_code == 0, result.output
    (tmp_path / "job.sh").write_text(result.stdout)
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        **{
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
        },
        **{"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NUM_NODES": "2"},
        **{"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_CPUS_ON_NODE": "1"},
    }
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            ["bash", "job.sh"],
            cwd=tmp_path,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    yield process
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)  # the script, and what it waits for
        process.wait(30)


def ask(address: str, token: str | None) -> str:
    """What a run is told that looks for three machines at an address."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["RAY_ADDRESS"] = address
    if token is not None:
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    done = subprocess.run([sys.executable, "-c", ASK], env=environment, capture_output=True, text=True)
    assert "Traceback" not in done.stderr and done.stdout.count("\n") == 1, (done.stdout, done.stderr)
    return done.stdout


@pytest.mark.slow
@pytest.mark.alone
def test_a_job_trains_on_two_machines_and_is_queued_again(job: subprocess.Popen, tmp_path: Path) -> None:
    log, metrics = tmp_path / "log", tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while (
        not (metrics.exists() and metrics.read_text()) and job.poll() is None and time.monotonic() < deadline
    ):
        time.sleep(0.1)
    assert log.read_text().count("Ray runtime started") == 2
    address = f"127.0.0.1:{20000 + os.getpid() % 10000}"

    refused = ask(address, None)
    assert "the cluster asks for a token, and this command's is missing or wrong" in refused
    assert all(part in refused for part in ("RAY_AUTH_MODE=token", "RAY_AUTH_TOKEN", "get-auth-token"))
    told = ask(address, (tmp_path / "token").read_text().strip())
    assert "trainer.nnodes: 3 asks for 3 machines, and the Ray cluster at" in told
    assert "has 2. Add machines" in told and "trainer.placement_timeout" in told

    family = psutil.Process(job.pid).children(recursive=True)
    job.send_signal(signal.SIGTERM)
    assert job.wait(90) == 143, log.read_text()
    assert not psutil.wait_procs(family, timeout=15)[1]
    assert "finishing the current step" in log.read_text() and "Traceback" not in log.read_text()
    assert (tmp_path / "scontrol.log").read_text() == f"requeue {os.getpid()}\n"
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))
    assert (tmp_path / "run" / f"global_step_{len(steps)}" / "manifest.json").exists()
