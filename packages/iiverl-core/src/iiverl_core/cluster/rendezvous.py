"""Process groups: where their processes find each other."""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

GROUP_TIMEOUT = timedelta(hours=2)
"""How long a process may wait for the others in a collective call: all wait while the first reads a model's files."""


def open_init_method(host: str) -> tuple[str, TCPStore]:
    """Return an `init_method` on `host`, which is this process's machine, and the store that listens there.

    This process is the first of the group, and finds the store when it joins; until then, somebody has to hold on to it.
    """
    store = TCPStore(host, 0, is_master=True, wait_for_workers=False, multi_tenant=True)
    return f"tcp://{host}:{store.port}", store


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
