"""Processes of a group meet at a port that is held from the moment it is chosen."""

import multiprocessing
import socket

import pytest
import torch
import torch.distributed as dist

from iiverl_core.cluster.rendezvous import join_process_group, open_init_method


def second(init_method: str, answers: "multiprocessing.Queue[float]") -> None:
    join_process_group(init_method, 1, 2, "cpu")
    value = torch.tensor([2.0])
    dist.all_reduce(value)
    answers.put(value.item())
    dist.destroy_process_group()


def test_the_port_is_held_until_the_group_has_it() -> None:
    init_method, store = open_init_method("127.0.0.1")
    port = int(init_method.rpartition(":")[2])
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port))
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    process = context.Process(target=second, args=(init_method, answers))
    process.start()
    try:
        join_process_group(init_method, 0, 2, "cpu")
        del store
        value = torch.tensor([1.0])
        dist.all_reduce(value)
        assert value.item() == answers.get(timeout=60) == 3.0
    finally:
        dist.destroy_process_group()
        process.join()
