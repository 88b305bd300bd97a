"""A task for SkyPilot: machines of a cloud, Ray on each, and the run on the first."""

from importlib.resources import files
from pathlib import PurePosixPath
from typing import Any

from iiverl_core.launch.job import Job
from iiverl_core.launch.yaml_text import documents

SHARED = "/shared"
COMMENT = """\
Start it with: sky jobs launch FILE (in the folder to which the paths of the configuration are relative).
A managed job that loses its machines gets others and runs again; the run resumes from its newest checkpoint. The run's
folder is on a volume of Kubernetes or RunPod that all machines share (ReadWriteMany): create it with `sky volumes apply`.
A mounted bucket does not do, since checkpoints are completed by renaming their folder."""


def skypilot(
    job: Job, *, accelerator: str, volume: str, interface: str | None = None, image: str | None = None
) -> str:
    """Write the task.

    Args:
        job: the run.
        accelerator: SkyPilot's name of the GPU, such as H100.
        volume: the name of the volume that all machines share.
        interface: the network interface for NCCL and Gloo; None leaves it to them.
        image: a container image with iiverl; None to install it when the machines start.
    """
    resources: dict[str, Any] = {
        "accelerators": f"{accelerator}:{job.devices}" if job.gpus else None,
        "cpus": None if job.gpus else f"{job.devices}+",
        "image_id": f"docker:{image}" if image else None,
        "use_spot": True,
        "job_recovery": {"max_restarts_on_errors": 3, "recover_on_exit_codes": [143]},
    }
    run = files("iiverl_core.launch").joinpath("templates", "skypilot.sh").read_text(encoding="utf-8")
    count = f"--num-gpus={job.devices}" if job.gpus else f"--num-cpus={job.devices}"
    folder = PurePosixPath(SHARED, job.folder)  # an absolute one stays as it is
    command = job.command(job.config, f"trainer.default_local_dir={folder}")
    task = {
        "name": job.name,
        "num_nodes": job.machines,
        "resources": {key: value for key, value in resources.items() if value is not None},
        "workdir": ".",
        "volumes": {SHARED: volume},
        "envs": {
            "HF_HOME": f"{SHARED}/.cache/huggingface",
            **dict.fromkeys(("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME") if interface else (), interface),
        },
        **(
            {}
            if image
            else {"setup": "python3 -m venv ~/iiverl\n~/iiverl/bin/pip install 'iiverl[fsdp,vllm]'\n"}
        ),
        "run": run.replace("@count@", count).replace("@command@", command),
    }
    return documents(COMMENT, task)
