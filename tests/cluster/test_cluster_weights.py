"""Weights on their way to engines in other processes: nothing is lost, doubled or held for long."""

import threading
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from iiverl_core.cluster.store import LocalStore
from iiverl_core.cluster.ways import Packed, ThroughStore
from iiverl_core.cluster.weights import Arriving, Departing

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64]
CPU = torch.device("cpu")


class Recorder:
    """A sender that keeps what it sent; each ticket is the bucket itself."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def ready(self) -> None:
        self.log.append("ready")

    def take(self, name: str, value: Tensor) -> tuple[str, Tensor]:
        return name, value.clone()

    def send(self, bucket: Sequence[Any]) -> Any:
        self.log.append("send")
        return list(bucket)

    def close(self) -> None: ...


@given(
    st.lists(st.tuples(st.integers(0, 40), st.sampled_from(DTYPES)), max_size=12),
    st.integers(1, 200),
)
def test_what_departs_arrives(sizes: list[tuple[int, torch.dtype]], bucket_bytes: int) -> None:
    weights = {f"w{i}": (torch.arange(n) - i).to(dtype).reshape(1, n) for i, (n, dtype) in enumerate(sizes)}
    got: dict[str, torch.Tensor] = {}

    def update(arriving) -> None:
        for name, value in arriving:
            assert name not in got
            got[name] = value

    store = LocalStore()
    sender, receiver = ThroughStore().sender(store, CPU), ThroughStore().receiver(0, store, CPU)
    departing = Departing(weights.items(), sender)
    arriving = Arriving(update)
    while (ticket := departing.next(bucket_bytes)) is not None:
        bucket = dict(receiver.receive(ticket))
        assert (
            sum(value.nbytes for value in bucket.values()) - list(bucket.values())[-1].nbytes < bucket_bytes
        )
        arriving.feed(bucket.items())
    arriving.finish()
    assert list(got) == list(weights)
    for name, value in weights.items():
        assert got[name].dtype == value.dtype and torch.equal(got[name], value)


def test_processes_that_only_take_part_gather_the_same_buckets() -> None:
    taken: list[list[int]] = [[], []]

    def weights(who: int):
        for i in range(9):
            taken[who].append(i)
            yield f"w{i}", torch.zeros(i + 1)

    sending, looking_on = Departing(weights(0), Recorder()), Departing(weights(1), None)
    while sending.next(40) is not None:
        assert looking_on.next(40) is None
        assert taken[0] == taken[1]
    assert len(taken[0]) == 9


def test_a_bucket_has_left_before_the_next_is_gathered() -> None:
    sender = Recorder()
    departing = Departing([("a", torch.zeros(4)), ("b", torch.zeros(4))], sender)
    while departing.next(1) is not None:
        pass
    assert sender.log == ["send", "ready", "send", "ready"]


def test_a_bucket_is_gone_once_it_has_been_fed() -> None:
    """All but what the engine itself looks at: the last weight, until it asks for another."""

    def update(arriving) -> None:
        for _, value in arriving:
            value.sum()

    arriving = Arriving(update)
    for _ in range(2):
        values = [torch.zeros(2), torch.zeros(2)]
        held = weakref.ref(values[0])
        arriving.feed(zip(("v", "w"), values, strict=True))
        del values
        assert held() is None
    arriving.finish()


def test_an_update_that_is_dropped_fails_and_leaves_nobody_waiting() -> None:
    ends: list[str] = []

    def update(arriving) -> None:
        try:
            for _ in arriving:
                pass
        except Exception as error:
            ends.append(type(error).__name__)
            raise

    for fed in range(2):
        arriving = Arriving(update)
        for _ in range(fed):
            arriving.feed([("w", torch.zeros(2))])
        arriving.drop()
    assert ends == ["DroppedError"] * 2
    assert not any(thread.name == "weights" and thread.is_alive() for thread in threading.enumerate())


def test_arrays_of_a_store_that_may_not_be_written_are_read() -> None:
    packed = Packed.of("w", torch.tensor([1.0, -2.0]))
    packed.data.flags.writeable = False
    assert packed.tensor().tolist() == [1.0, -2.0]


def test_an_update_that_fails_is_heard_of_and_blocks_no_one() -> None:
    def update(arriving) -> None:
        next(arriving)
        raise ValueError("no such weight")

    arriving = Arriving(update)
    bucket = [("w", torch.zeros(2))]
    with pytest.raises(ValueError, match="no such weight"):
        for _ in range(3):
            arriving.feed(bucket)
        arriving.finish()
    assert not any(thread.name == "weights" and thread.is_alive() for thread in threading.enumerate())
