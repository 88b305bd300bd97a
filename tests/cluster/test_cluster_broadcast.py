"""Weights that go from process to process in a group of their own: bit-equal, and nobody waits for the dead."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from iiverl_core.cluster.broadcast import Broadcast, Exchange
from iiverl_core.cluster.store import LocalStore
from iiverl_core.cluster.ways import BrokenWayError
from iiverl_core.rollout.digest import digest

CPU = torch.device("cpu")
SPAWN = multiprocessing.get_context("spawn")


def weights() -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        ("bf16", torch.randn(64, 3, generator=generator).bfloat16()),
        ("a number", torch.tensor(7)),
        ("transposed", torch.randn(5, 4, generator=generator).t()),
        ("empty", torch.zeros(0, 2)),
    ]


@pytest.fixture
def exchange() -> Exchange:
    return Exchange("127.0.0.1")


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


def connect(exchange: Exchange, receivers: int) -> tuple[Any, list[Any]]:
    """All ends of one way in this process, as if each were in its own."""
    way = exchange.way(receivers)
    sender = way.sender(LocalStore(), CPU)
    return sender, [way.receiver(number, LocalStore(), CPU) for number in range(receivers)]


def test_every_receiver_gets_the_bits_of_each_bucket(exchange: Exchange, threads: ThreadPoolExecutor) -> None:
    sender, receivers = connect(exchange, 3)
    for bucket in (weights(), weights()[::-1]):
        taken = [sender.take(name, value) for name, value in bucket]
        ticket = sender.send(taken)
        for got in threads.map(lambda receiver, ticket=ticket: list(receiver.receive(ticket)), receivers):
            assert [name for name, _ in got] == [name for name, _ in bucket]
            for (_, ours), (_, theirs) in zip(bucket, got, strict=True):
                assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
                assert digest(ours) == digest(theirs)
        sender.ready()
    for end in (sender, *receivers):
        end.close()


def test_what_was_taken_is_a_copy(exchange: Exchange) -> None:
    sender, (receiver,) = connect(exchange, 1)
    value = torch.ones(3)
    taken = sender.take("w", value)
    value.zero_()
    ((_, got),) = receiver.receive(sender.send([taken]))
    assert got.tolist() == [1, 1, 1]


def test_the_way_is_the_same_until_it_is_given_up(exchange: Exchange) -> None:
    first = exchange.way(2)
    assert exchange.way(2) == first
    exchange.give_up("a member died")
    exchange.give_up("a member died")
    assert exchange.way(2) != first


def test_who_waits_for_a_bucket_hears_that_the_way_is_given_up(
    exchange: Exchange, threads: ThreadPoolExecutor
) -> None:
    sender, receivers = connect(exchange, 2)
    waiting = threads.submit(receivers[0].receive, [("w", "float32", (2,))])
    time.sleep(0.3)
    assert not waiting.done()
    exchange.give_up("member 2 has died")
    with pytest.raises(BrokenWayError, match="member 2 has died"):
        waiting.result(5)
    sender.send([sender.take("w", torch.ones(2))])
    with pytest.raises(BrokenWayError, match="member 2 has died"):
        sender.ready()


def test_who_waits_to_join_hears_that_the_way_is_given_up(
    exchange: Exchange, threads: ThreadPoolExecutor
) -> None:
    sender = exchange.way(1).sender(LocalStore(), CPU)
    waiting = threads.submit(sender.ready)
    time.sleep(0.3)
    assert not waiting.done()
    exchange.give_up("the receiver has died")
    with pytest.raises(BrokenWayError, match="the receiver has died"):
        waiting.result(5)


def _dies_after(way: Broadcast, buckets: int, ticket: Any) -> None:
    receiver = way.receiver(0, LocalStore(), CPU)
    for _ in range(buckets):
        list(receiver.receive(ticket))
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("received", [0, 1])
def test_a_member_that_dies_holds_nobody_up(
    exchange: Exchange, threads: ThreadPoolExecutor, received: int
) -> None:
    """Where a connection closes, those at its other end tell all; else the one who directs them has to."""
    way = exchange.way(2)
    ticket = [("w", "float32", (2**20,))]
    victim = SPAWN.Process(target=_dies_after, args=(way, received, ticket))
    victim.start()
    sender = way.sender(LocalStore(), CPU)
    survivor = way.receiver(1, LocalStore(), CPU)

    def pass_on(receive: Callable[[Any], Iterator[Any]]) -> None:
        for _ in range(3):
            sender.send([sender.take("w", torch.ones(2**20))])
            list(receive(ticket))
            sender.ready()

    running = threads.submit(pass_on, survivor.receive)
    victim.join(30)
    if not received:
        exchange.give_up("a member died before it had joined")
    with pytest.raises(BrokenWayError, match=r"a member died|onnection|Read error|Broken pipe"):
        running.result(10)
    sender.close()
    survivor.close()
