"""Processes that compute together find each other."""

import socket

import torch.distributed as dist


def free_address(host: str) -> str:
    """Give an `init_method` on `host`, which is this process's machine: a TCP address with a free port."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return f"tcp://{host}:{probe.getsockname()[1]}"


def join(init_method: str, rank: int, size: int, device_type: str) -> None:
    """Join `size` processes for collective calls on `cpu` or `cuda`, unless this process has joined a group."""
    if not dist.is_initialized():
        kind = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
        dist.init_process_group(kind, init_method=init_method, rank=rank, world_size=size)
