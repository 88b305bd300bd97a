"""A script for Slurm's `sbatch`: Ray on the machines of a job, and the run on the first."""

import sys
from importlib.resources import files
from pathlib import Path

from iiverl_core.launch.job import Job


def slurm(job: Job, *, interface: str | None = None, time: str = "24:00:00") -> str:
    """Write the script.

    Args:
        job: the run.
        interface: the network interface for NCCL and Gloo; None leaves it to them.
        time: the time limit, as `sbatch --time` takes it.
    """
    name = interface or "ib0"
    exports = f"export NCCL_SOCKET_IFNAME={name} GLOO_SOCKET_IFNAME={name}"
    values = {
        "name": job.name,
        "machines": str(job.machines),
        "gpus": f"#SBATCH --gpus-per-node={job.devices}"
        if job.gpus
        else f"#SBATCH --cpus-per-task={job.devices}",
        "time": time,
        "lead": str(job.lead_s),
        "bin": str(Path(sys.prefix, "bin")),
        "interface": exports if interface else f"# {exports}",
        "count": f"--num-gpus={job.devices}" if job.gpus else f"--num-cpus={job.devices}",
        "command": job.command(job.config),
    }
    text = files("iiverl_core.launch").joinpath("templates", "slurm.sh").read_text(encoding="utf-8")
    for name, value in values.items():
        text = text.replace(f"@{name}@", value)
    return text
