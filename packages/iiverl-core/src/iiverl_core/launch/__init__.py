"""Files that start a run on several machines: a Slurm script, a RayJob for KubeRay, a task for SkyPilot."""

from iiverl_core.launch.job import Job, job_of
from iiverl_core.launch.kuberay import kuberay
from iiverl_core.launch.skypilot import skypilot
from iiverl_core.launch.slurm import slurm

__all__ = ["Job", "job_of", "kuberay", "skypilot", "slurm"]
