"""A RayJob for KubeRay: a Ray cluster for one run, which starts again after a failure and resumes."""

import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Any

from iiverl_core.launch.job import Job
from iiverl_core.launch.yaml_text import documents

SHARED = "/shared"
CONFIG_FOLDER = "/etc/iiverl"
ATTEMPTS = 10
COMMENT = """\
Start it with: kubectl apply -f FILE (KubeRay 1.2 or later).
The volume claim has to be ReadWriteMany. It is the working folder: datasets, models and the run's folder are below
/shared, and the paths of the configuration are relative to it. Each worker has a machine's GPUs for itself.
A worker that is evicted comes back, and the run goes on from its newest checkpoint (trainer.max_restarts). If the head
is lost, the job starts again as a whole and resumes (backoffLimit)."""


def kuberay(job: Job, *, image: str, claim: str, interface: str | None = None, memory: str = "64Gi") -> str:
    """Write the RayJob and, if the run has a file, a ConfigMap with it.

    Args:
        job: the run.
        image: the container image, with iiverl and the version of Ray that is installed here.
        claim: the name of the volume claim that all pods share.
        interface: the network interface for NCCL and Gloo; None leaves it to them.
        memory: the memory of each pod.
    """
    volumes: list[dict[str, Any]] = [
        {"name": "shared", "persistentVolumeClaim": {"claimName": claim}},
        {"name": "shm", "emptyDir": {"medium": "Memory"}},
    ]
    mounts = [{"name": "shared", "mountPath": SHARED}, {"name": "shm", "mountPath": "/dev/shm"}]
    maps: list[Any] = []
    path = None
    if job.config is not None:
        file = Path(job.config)
        path = f"{CONFIG_FOLDER}/{file.name}"
        name = f"{job.name}-config"
        volumes.append({"name": "config", "configMap": {"name": name}})
        mounts.append({"name": "config", "mountPath": CONFIG_FOLDER})
        data = {file.name: file.read_text(encoding="utf-8")}
        maps.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data})
    variables = {"HF_HOME": f"{SHARED}/.cache/huggingface", "RAY_JOB_STOP_WAIT_TIME_S": str(job.lead_s)}
    if interface:
        variables |= dict.fromkeys(("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"), interface)

    def pod(container: str, limits: dict[str, str]) -> dict[str, Any]:
        return {
            "spec": {
                "terminationGracePeriodSeconds": job.lead_s,
                "containers": [
                    {
                        "name": container,
                        "image": image,
                        "env": [{"name": key, "value": value} for key, value in variables.items()],
                        "resources": {"limits": limits, "requests": limits},
                        "volumeMounts": mounts,
                    }
                ],
                "volumes": volumes,
            }
        }

    devices = {"nvidia.com/gpu": str(job.devices)} if job.gpus else {}
    cpus = str(max(2 * job.devices, 4))
    ray_job = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": job.name},
        "spec": {
            "entrypoint": f"bash -c {shlex.quote(f'cd {SHARED} && exec {job.command(path)}')}",
            "backoffLimit": ATTEMPTS,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            "rayClusterSpec": {
                "rayVersion": version("ray"),
                "headGroupSpec": {
                    "rayStartParams": {"num-cpus": "0", "num-gpus": "0", "dashboard-host": "0.0.0.0"},
                    "template": pod("ray-head", {"cpu": "4", "memory": "16Gi"}),
                },
                "workerGroupSpecs": [
                    {
                        "groupName": "workers",
                        "replicas": job.machines,
                        "minReplicas": job.machines,
                        "maxReplicas": job.machines,
                        "rayStartParams": {},
                        "template": pod("ray-worker", {"cpu": cpus, "memory": memory, **devices}),
                    }
                ],
            },
        },
    }
    return documents(COMMENT, *maps, ray_job)
