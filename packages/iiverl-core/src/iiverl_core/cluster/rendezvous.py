"""Process groups: where their processes find each other."""

import socket
from datetime import timedelta

import torch
import torch.distributed as dist

GROUP_TIMEOUT = timedelta(hours=2)
"""How long a process may wait for the others in a collective call: all wait while the first reads a model's files."""


def free_init_method(host: str) -> str:
    """Return an `init_method` on `host`, which is this process's machine: a TCP address with a free port."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return f"tcp://{host}:{probe.getsockname()[1]}"


def join_process_group(init_method: str, rank: int, size: int, device_type: str) -> None:
    """Join the default process group of `size` processes on `cpu` or `cuda`, unless this process is in one."""
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
        if device_type == "cuda":
            torch.cuda.set_device(
                0
            )  # the only one that this process sees; device meshes warn if none is chosen
        dist.init_process_group(
            backend, init_method=init_method, rank=rank, world_size=size, timeout=GROUP_TIMEOUT
        )
