"""Processes of a group meet at a port that is held from the moment it is chosen, and make further groups on their own."""

import multiprocessing
import multiprocessing.synchronize
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


def waiting(init_method: str, may_end: "multiprocessing.synchronize.Event") -> None:
    join_process_group(init_method, 1, 2, "cpu")
    may_end.wait(60)
    dist.destroy_process_group()


@pytest.mark.timeout(60)
def test_groups_of_other_processes_are_made_without_waiting_for_them() -> None:
    """An engine with the trainer's processes makes groups of every one of them, those of a single process among them.

    So its start does not grow with the time in which processes answer each other, only with the number of groups.
    """
    init_method, store = open_init_method("127.0.0.1")
    context = multiprocessing.get_context("fork")
    may_end = context.Event()
    process = context.Process(target=waiting, args=(init_method, may_end))
    process.start()
    try:
        join_process_group(init_method, 0, 2, "cpu")
        del store
        for _ in range(100):  # the other process takes part in none of these calls
            assert dist.new_group([1], backend="gloo") == dist.GroupMember.NON_GROUP_MEMBER
            own = dist.new_group([0], backend="gloo")
            assert isinstance(own, dist.ProcessGroup) and own.size() == 1
    finally:
        may_end.set()
        dist.destroy_process_group()
        process.join()
