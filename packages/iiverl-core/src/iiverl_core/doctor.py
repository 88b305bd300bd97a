"""Facts about this machine that matter to a run, and problems that keep runs from using it."""

import os
import platform
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from iiverl_core.checkpoints import versions
from iiverl_core.registry import BACKENDS, ENGINES, REGISTRIES

GIB = 2**30
SHARED_MEMORY = Path("/dev/shm")
LEAST_SHARED_MEMORY = 2 * GIB  # below, Ray keeps its objects in files
LEAST_FILES = 4096  # that a process may have open; Ray and a reward server with many clients need that many
LEAST_SPACE = GIB
SETTINGS = ("CUDA_VISIBLE_DEVICES", "RAY_ADDRESS", "HF_HOME", "HF_HUB_OFFLINE", "TMPDIR")


@dataclass(frozen=True)
class Gpu:
    """A GPU as its driver sees it; memory in bytes."""

    name: str
    memory: int
    driver: str


@dataclass(frozen=True)
class Diagnosis:
    """What was found: `facts` by topic, the version of each package, what can be used, what is missing, and why.

    `missing` says by name what has to be installed. `problems` keep runs from using what is there, or slow them down.
    """

    facts: Mapping[str, str]
    packages: Mapping[str, str]
    usable: Mapping[str, tuple[str, ...]]
    missing: Mapping[str, str]
    problems: tuple[str, ...] = field(default=())


def diagnose() -> Diagnosis:
    """Look at this machine and what is installed. Imports torch, which takes seconds."""
    gpus, packages = find_gpus(), versions()
    usable: dict[str, tuple[str, ...]] = {}
    missing: dict[str, str] = {}
    for registry in REGISTRIES:
        reasons = {info.name: info.missing() for info in registry.values()}
        if any(reasons.values()) or registry in (BACKENDS, ENGINES):
            usable[registry.label] = tuple(name for name, reason in reasons.items() if reason is None)
        missing |= {f"{registry.label} {name}": reason for name, reason in reasons.items() if reason}
    return Diagnosis(_facts(gpus), packages, usable, missing, tuple(_problems(gpus, packages)))


def find_gpus() -> list[Gpu]:
    """Ask NVIDIA's driver for the GPUs of this machine; without a driver there are none."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    return [Gpu(name, int(mebibytes) * 2**20, driver) for name, mebibytes, driver in rows]


def _facts(gpus: list[Gpu]) -> dict[str, str]:
    memory, folder = psutil.virtual_memory(), Path.cwd()
    facts = {
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "processor": f"{len(os.sched_getaffinity(0))} cores for this process, of {os.cpu_count()}",
        "memory": f"{_gib(memory.total)}, {_gib(memory.available)} free",
        "disk": f"{_gib(shutil.disk_usage(folder).free)} free in {folder}",
    }
    if SHARED_MEMORY.is_dir():
        facts["shared memory"] = _gib(shutil.disk_usage(SHARED_MEMORY).total)
    names = [f"{gpu.name}, {_gib(gpu.memory)}" for gpu in gpus]
    counted = [f"{names.count(name)} × {name}" for name in dict.fromkeys(names)]
    facts["GPUs"] = (
        f"{'; '.join(counted)} (driver {gpus[0].driver})" if gpus else "none: runs use the processor"
    )
    set_here = [f"{name}={os.environ[name]}" for name in SETTINGS if name in os.environ]
    return facts | ({"environment": ", ".join(set_here)} if set_here else {})


def _problems(gpus: list[Gpu], packages: Mapping[str, str]) -> Iterator[str]:
    if all(backend.missing() for backend in BACKENDS.values()):
        yield "no training backend is installed: see above for how to install one"
    if gpus and "torch" in packages and (problem := _torch_problem(len(gpus), packages["torch"])):
        yield problem
    if SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).total < LEAST_SHARED_MEMORY:
        yield (
            f"{SHARED_MEMORY} has {_gib(shutil.disk_usage(SHARED_MEMORY).total)}, so Ray keeps its objects in files, which "
            "is slow: start the container with --shm-size=8g, or more"
        )
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY and most < LEAST_FILES:
        yield f"a process may have {most} files open, which is few for Ray: ulimit -n {16 * LEAST_FILES}"
    temporary = Path(tempfile.gettempdir())
    if shutil.disk_usage(temporary).free < LEAST_SPACE:
        yield f"{temporary} has {_gib(shutil.disk_usage(temporary).free)} left: free some, or set TMPDIR to another folder"


def _torch_problem(gpus: int, version: str) -> str | None:
    """Explain why torch does not see the GPUs; None if it does, or was told not to."""
    import torch

    if torch.cuda.is_available() or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return None
    see = "the GPU" if gpus == 1 else f"the {gpus} GPUs"
    if torch.version.cuda is None:
        return f"torch {version} is built for processors and does not see {see}: install a build for CUDA"
    return (
        f"torch {version} does not see {see}: it is built for CUDA {torch.version.cuda}, for which the driver may be too old, "
        "or this process may not use /dev/nvidia*"
    )


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"
