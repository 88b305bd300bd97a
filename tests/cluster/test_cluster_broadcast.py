"""Broadcasts of weights: the bits arrive, and nobody waits for a dead process."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from iiverl_core.cluster.store import LocalStore
from iiverl_core.cluster.weight_transport import BroadcastRendezvous, WeightTransport, WeightTransportError
from iiverl_core.rollout.weights import digest

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
def rendezvous() -> BroadcastRendezvous:
    return BroadcastRendezvous("127.0.0.1")


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


def connect(rendezvous: BroadcastRendezvous, receivers: int) -> tuple[Any, list[Any]]:
    """All ends of one transport in this process, as if each were in its own."""
    transport = rendezvous.transport(range(receivers))
    sender = transport.open_sender(LocalStore(), CPU)
    return sender, [transport.open_receiver(number, LocalStore(), CPU) for number in range(receivers)]


def test_every_receiver_gets_the_bits_of_each_bucket(
    rendezvous: BroadcastRendezvous, threads: ThreadPoolExecutor
) -> None:
    sender, receivers = connect(rendezvous, 3)
    for bucket in (weights(), weights()[::-1]):
        packed = [sender.pack(name, value) for name, value in bucket]
        metadata = sender.send(packed)
        for got in threads.map(
            lambda receiver, metadata=metadata: list(receiver.receive(metadata)), receivers
        ):
            assert [name for name, _ in got] == [name for name, _ in bucket]
            for (_, ours), (_, theirs) in zip(bucket, got, strict=True):
                assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
                assert digest(ours) == digest(theirs)
        sender.flush()
    for end in (sender, *receivers):
        end.close()


def test_a_packed_weight_is_a_copy(rendezvous: BroadcastRendezvous) -> None:
    sender, (receiver,) = connect(rendezvous, 1)
    value = torch.ones(3)
    packed = sender.pack("w", value)
    value.zero_()
    ((_, got),) = receiver.receive(sender.send([packed]))
    assert got.tolist() == [1, 1, 1]


def test_the_transport_is_the_same_until_it_is_aborted(rendezvous: BroadcastRendezvous) -> None:
    first = rendezvous.transport([0, 1])
    assert rendezvous.transport([0, 1]) == first
    rendezvous.abort("a member died")
    rendezvous.abort("a member died")
    assert rendezvous.transport([0, 1]) != first


def test_an_abort_ends_the_wait_for_a_bucket(
    rendezvous: BroadcastRendezvous, threads: ThreadPoolExecutor
) -> None:
    sender, receivers = connect(rendezvous, 2)
    waiting = threads.submit(receivers[0].receive, [("w", "float32", (2,))])
    time.sleep(0.3)
    assert not waiting.done()
    rendezvous.abort("member 2 has died")
    with pytest.raises(WeightTransportError, match="member 2 has died"):
        waiting.result(5)
    sender.send([sender.pack("w", torch.ones(2))])
    with pytest.raises(WeightTransportError, match="member 2 has died"):
        sender.flush()


def test_an_abort_ends_the_wait_for_members_to_join(
    rendezvous: BroadcastRendezvous, threads: ThreadPoolExecutor
) -> None:
    sender = rendezvous.transport([0]).open_sender(LocalStore(), CPU)
    waiting = threads.submit(sender.flush)
    time.sleep(0.3)
    assert not waiting.done()
    rendezvous.abort("the receiver has died")
    with pytest.raises(WeightTransportError, match="the receiver has died"):
        waiting.result(5)


def _dies_after(transport: WeightTransport, buckets: int, metadata: Any) -> None:
    receiver = transport.open_receiver(0, LocalStore(), CPU)
    for _ in range(buckets):
        list(receiver.receive(metadata))
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("received", [0, 1])
def test_a_member_that_dies_blocks_nobody(
    rendezvous: BroadcastRendezvous, threads: ThreadPoolExecutor, received: int
) -> None:
    """If a connection closes, the processes at its other end abort; else the controller has to."""
    transport = rendezvous.transport([0, 1])
    metadata = [("w", "float32", (2**20,))]
    victim = SPAWN.Process(target=_dies_after, args=(transport, received, metadata))
    victim.start()
    sender = transport.open_sender(LocalStore(), CPU)
    survivor = transport.open_receiver(1, LocalStore(), CPU)

    def transfer(receive: Callable[[Any], Iterator[Any]]) -> None:
        for _ in range(3):
            sender.send([sender.pack("w", torch.ones(2**20))])
            list(receive(metadata))
            sender.flush()

    running = threads.submit(transfer, survivor.receive)
    victim.join(60)
    if not received:
        rendezvous.abort("a member died before it had joined")
    with pytest.raises(WeightTransportError, match=r"a member died|onnection|Read error|Broken pipe"):
        running.result(30)
    sender.close()
    survivor.close()
